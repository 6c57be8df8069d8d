"""What forwarded requests cost a key: as their answers say, in every dialect, or an estimate from bytes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.config.options import KeyConfig, ProxyConfig, UpstreamConfig
from brlite.proxy.usage import (
    RUN_BYTES,
    TAIL_BYTES,
    ForwardedUsage,
    estimate_prompt,
    num_encoded_bytes,
    reported_usage,
    usage_in_tail,
)
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import Proxy, run_proxy, wait_until
from tests.proxy.raw_client import Answer, Client, post
from tests.proxy.scripted import Call, ScriptedUpstream, Step, Then
from tests.proxy.scripts import DONE, JSON_HEAD, TOKENS, UPSTREAM_ERROR, answer, chunks, event, length, sse

SECRET = b"Authorization: Bearer sk-1"
CHAT = b"/v1/chat/completions"


def sent(event: object) -> bytes:
    return b"data: %b\n\n" % json.dumps(event).encode()


MESSAGES_STREAM = [
    sent({"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 1}}}),
    sent({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}}),
    sent({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}}),
    sent({"type": "message_stop"}),
]
RESPONSES_STREAM = [
    sent({"type": "response.created", "response": {"id": "1", "usage": None}}),
    sent({"type": "response.output_text.delta", "delta": "Hello"}),
    sent({"type": "response.completed", "response": {"usage": {"input_tokens": 36, "output_tokens": 87}}}),
]
CONTINUOUS = [
    sent({"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}),
    sent({"choices": [{"index": 0, "delta": {"content": "b"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
    sent({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}),
]

ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "", "refusal": None}}]}


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Awaitable[World]]]:
    """`await start(plain=…, stream=…, tokens_per_minute=…)`."""
    async with AsyncExitStack() as stack:

        async def make(plain: bytes = b"", stream: bytes = b"", tokens_per_minute: int = 10**6) -> World:
            upstream = await stack.enter_async_context(ScriptedUpstream(Step(plain), Step(stream)))
            config = UpstreamConfig(url=upstream.url, name="one", models=("m",), health_path="")
            key = KeyConfig(name="team", key="sk-1", tokens_per_minute=tokens_per_minute)
            proxy = ProxyConfig(held_bytes=64 * 1024)
            return World(upstream, await stack.enter_async_context(run_proxy(config, key=(key,), proxy=proxy)))

        yield make


class World:
    def __init__(self, upstream: ScriptedUpstream, proxy: Proxy) -> None:
        self.upstream, self.proxy = upstream, proxy
        self.key = next(iter(proxy.keys))

    async def ask(self, path: bytes = CHAT, **fields: object) -> Answer:
        client = await Client.connect(self.proxy.port)
        client.send(post({"model": "m", **fields}, SECRET, path=path))
        try:
            return await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
        finally:
            client.leave()

    @property
    def spent(self) -> tuple[int, int]:
        usage = self.key.usage
        return usage.prompt_tokens, usage.completion_tokens


def json_answer(**fields: object) -> bytes:
    return JSON_HEAD + length(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("path", "plain", "stream", "spent"),
    [
        (CHAT, {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, None, (3, 4)),
        (CHAT, None, CONTINUOUS, (3, 2)),
        (b"/v1/messages", {"usage": {"input_tokens": 25, "output_tokens": 15}}, None, (25, 15)),
        (
            b"/v1/messages",
            {"usage": {"input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 2}},
            None,
            (14, 0),
        ),
        (b"/v1/messages", None, MESSAGES_STREAM, (25, 15)),
        (b"/v1/responses", {"usage": {"input_tokens": 36, "output_tokens": 87, "total_tokens": 123}}, None, (36, 87)),
        (b"/v1/responses", None, RESPONSES_STREAM, (36, 87)),
        (b"/v1/rerank", {"results": [], "usage": {"total_tokens": 56}}, None, (56, 0)),
        (b"/v1/embeddings", {"data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}}, None, (8, 0)),
        (b"/v2/rerank", {"results": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, None, (9, 0)),
        (b"/pooling", {"data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}}, None, (7, 0)),
        (b"/v1/score", {"data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}}, None, (8, 0)),
        (b"/tokenize", {"count": 900, "tokens": [1] * 900}, None, (0, 0)),
        (b"/v1/messages/count_tokens", {"input_tokens": 900}, None, (0, 0)),
    ],
)
async def test_usage_is_charged_as_the_answer_says_in_every_dialect(
    start, path: bytes, plain: dict[str, object] | None, stream: list[bytes] | None, spent: tuple[int, int]
) -> None:
    world = await start(json_answer(**(plain or {})), sse(chunks(*(stream or []))))

    got = await world.ask(path, stream=stream is not None)

    assert (got.status, world.spent) == (200, spent)


@pytest.mark.parametrize("end", [chunks(*TOKENS, DONE), chunks(*TOKENS[:2], end=b"")], ids=["whole", "cut"])
async def test_a_stream_that_tells_no_usage_costs_an_estimate_of_its_prompt_and_text(start, end: bytes) -> None:
    world = await start()
    world.upstream.stream = Step(sse(end), "close")

    await world.ask(stream=True, messages=[{"role": "user", "content": "x" * 400}])

    prompt, completion = world.spent
    assert 100 <= prompt <= 150
    assert 2 <= completion <= 60


async def test_a_long_text_in_few_events_costs_more_than_a_token_an_event(start) -> None:
    world = await start(stream=sse(chunks(event("x" * 4000), event("", "stop"), DONE)))

    await world.ask(stream=True)

    assert 950 <= world.spent[1] <= 1050


async def test_the_usage_at_the_end_of_an_answer_too_long_to_be_kept_is_charged(start) -> None:
    data = [{"embedding": [0.25] * 40_000}]
    world = await start(json_answer(data=data, usage={"prompt_tokens": 8, "total_tokens": 8}))

    got = await world.ask(b"/v1/embeddings")

    assert len(got.body) > 64 * 1024
    assert world.spent == (8, 0)


async def test_an_impossible_usage_is_not_believed_and_shuts_no_key_out(start, caplog) -> None:
    world = await start(json_answer(usage={"prompt_tokens": 10**9, "completion_tokens": 10**9}), tokens_per_minute=1000)

    answers = [await world.ask() for _ in range(3)]

    assert [got.status for got in answers] == [200] * 3
    assert sum(world.spent) < 200
    assert "impossible usage" in caplog.text


async def test_a_client_that_leaves_a_stream_early_pays_for_its_prompt(start) -> None:
    async def stall(call: Call) -> Then:
        await call.send(sse(chunks(TOKENS[0], end=b"")))
        await call.wait_left()
        return "keep"

    world = await start()
    world.upstream.act = stall
    client = await Client.connect(world.proxy.port)
    client.send(post({"model": "m", "stream": True, "prompt": "x" * 4000}, SECRET, path=b"/v1/completions"))
    await asyncio.wait_for(client.reader.readuntil(TOKENS[0]), PATIENCE_SECONDS)
    client.leave()
    await wait_until(lambda: world.proxy.forwarder.num_active == 0)

    assert 1000 <= world.spent[0] <= 1100
    assert world.spent[1] >= 1


async def test_the_estimate_is_taken_at_once_and_corrected_in_the_end(start) -> None:
    may_answer = asyncio.Event()

    async def wait(call: Call) -> Then:
        await may_answer.wait()
        await call.send(json_answer(usage={"prompt_tokens": 5, "completion_tokens": 5}))
        return "keep"

    world = await start(tokens_per_minute=1000)
    world.upstream.act = wait
    first = asyncio.create_task(world.ask(prompt="two words " * 800))
    await wait_until(lambda: world.upstream.num_busy == 1)
    refused = await world.ask()
    may_answer.set()

    assert refused.status == 429
    assert (await first).status == 200
    assert (await world.ask()).status == 200
    assert world.spent == (10, 10)


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_what_was_refused_costs_nothing(start, status: int) -> None:
    world = await start(answer(b"%d No" % status, UPSTREAM_ERROR), tokens_per_minute=100)

    answers = [await world.ask(prompt="x" * 1000) for _ in range(3)]

    assert [got.status for got in answers] == [status] * 3
    assert world.spent == (0, 0)


@pytest.mark.parametrize(
    ("path", "events", "spent"),
    [
        (CHAT, [{"error": {"message": "full"}}], (0, 0)),
        (CHAT, [ROLE, ROLE, {"error": {"message": "full"}}], (0, 0)),
        (CHAT, [ROLE, {"choices": [{"index": 0, "delta": {"content": "a"}}]}, {"error": {"message": "lost"}}], (7, 10)),
        (
            b"/v1/messages",
            [
                {"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 0}}},
                {"type": "ping"},
                {"type": "error", "error": {"message": "full"}},
            ],
            (0, 0),
        ),
        (
            b"/v1/responses",
            [
                {"type": "response.created", "sequence_number": 0, "response": {"id": "1", "usage": None}},
                {"type": "response.failed", "sequence_number": 1, "response": {"id": "1", "usage": None}},
            ],
            (0, 0),
        ),
        (CHAT, [{"choices": [{"index": 0, "delta": {"content": "a"}}]}, {"error": {"message": "lost"}}], (7, 2)),
    ],
)
async def test_a_stream_that_has_an_error_and_no_text_costs_nothing(
    start, path: bytes, events: list[object], spent: tuple[int, int]
) -> None:
    end = [DONE] if path == CHAT else []
    world = await start(stream=sse(chunks(*map(sent, events), *end)))

    await world.ask(path, stream=True)

    assert world.spent == spent


async def test_what_could_not_be_sent_costs_nothing(start) -> None:
    world = await start()
    await world.upstream.kill()

    await world.ask()

    assert world.spent == (0, 0)


def test_pictures_in_the_body_are_not_counted_as_text() -> None:
    picture = b"QUJD" * 50_000

    assert estimate_prompt(CHAT, b'{"url":"data:image/png;base64,%b"}' % picture) < 1000
    assert estimate_prompt(CHAT, b'{"text":"%b"}' % (b"word " * 40_000)) > 40_000


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"usage":"x"}', b'{"usage":{"prompt_tokens":-1}}', b"\xff"])
def test_what_tells_no_usage_tells_none(text: bytes) -> None:
    assert reported_usage((text,)) is None


@given(st.lists(st.binary(), max_size=3))
def test_no_bytes_raise_anything(parts: list[bytes]) -> None:
    reported_usage(parts)
    usage_in_tail(b"".join(parts))


def test_a_usage_that_a_text_quotes_is_none() -> None:
    quoted = json.dumps({"text": '"usage":{"prompt_tokens":7}'}).encode()

    assert usage_in_tail(quoted) == ()
    assert reported_usage(
        usage_in_tail(quoted + b',"usage" : {"prompt_tokens":1,"details":{"cached":0}}}')
    ) == ForwardedUsage(1, 0)


def test_a_tail_that_has_only_half_of_it_tells_nothing() -> None:
    assert usage_in_tail((b'{"usage":{"a":' + b"{" * TAIL_BYTES)[-TAIL_BYTES:]) == ()


# Lengths of runs of letters, each with the bytes behind it.
runs = st.lists(
    st.tuples(
        st.integers(0, 3 * RUN_BYTES) | st.sampled_from([RUN_BYTES - 1, RUN_BYTES, RUN_BYTES + 1]),
        st.sampled_from([b"=", b"==", b"===", b"-", b'","', b"= "]),
    ),
    max_size=6,
)


@given(runs)
def test_each_long_run_of_letters_counts_as_base64_wherever_it_stands(runs: list[tuple[int, bytes]]) -> None:
    body = b"{" + b"".join(b"A" * size + behind for size, behind in runs)

    found = re.findall(rb"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{%d,}={0,2}" % RUN_BYTES, body)

    assert num_encoded_bytes(body) == sum(map(len, found))

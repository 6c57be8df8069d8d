"""Keys with rules of their own, for models that other servers have: on the fast path and through aiohttp alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import aiohttp
import msgspec
import pytest

from brlite.config.options import KeyConfig, UpstreamConfig
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import Proxy, run_proxy
from tests.proxy.raw_client import Answer, Client, post
from tests.proxy.scripted import ScriptedUpstream, Step
from tests.proxy.scripts import GOOD_PLAIN, GOOD_STREAM, TOKENS, chunks, sse

SECRET = b"Authorization: Bearer secret-a"
PATHS = {"fast_path": (), "aiohttp": (b"Connection: upgrade", b"Upgrade: nothing")}
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
WELL = Step(GOOD_STREAM)
TELLING = Step(sse(chunks(*TOKENS, USAGE, b"data: [DONE]\n\n")))

Ask = Callable[..., Awaitable[Answer]]
Start = Callable[..., Awaitable[tuple[Proxy, Ask]]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`await start(stream=…, max_concurrent=1, …)` is a proxy with one key of these rules, and who asks it."""
    async with AsyncExitStack() as stack:

        async def make(stream: Step = WELL, **rules: object) -> tuple[Proxy, Ask]:
            upstream = ScriptedUpstream(Step(GOOD_PLAIN), stream)
            await stack.enter_async_context(upstream)
            key = KeyConfig(name="team-a", key="secret-a", admin=True, **rules)  # type: ignore[arg-type]  # any of its rules
            config = UpstreamConfig(url=upstream.url, models=("m", "other"), health_path="")
            proxy = await stack.enter_async_context(run_proxy(config, key=(key,)))

            async def ask(model: str = "m", *headers: bytes, **fields: object) -> Answer:
                client = await Client.connect(proxy.port)
                client.send(post({"model": model, **fields}, *headers))
                try:
                    return await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
                finally:
                    client.leave()

            return proxy, ask

        yield make


async def scrape(proxy: Proxy) -> str:
    session = aiohttp.ClientSession(headers={"Authorization": "Bearer secret-a"})
    async with session, session.get(f"{proxy.server.url}/metrics") as response:
        return await response.text()


def error_code(answer: Answer) -> str:
    code = msgspec.json.decode(answer.body)["error"]["code"]
    assert isinstance(code, str)
    return code


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
async def test_a_key_is_needed_and_opens_its_own_models_only(start: Start, path: tuple[bytes, ...]) -> None:
    _, ask = await start(models=("m",))

    answers = [
        await ask("m", *path),
        await ask("m", b"Authorization: Bearer wrong", *path),
        await ask("other", SECRET, *path),
        await ask("m", SECRET, *path),
        await ask("m", b"X-Api-Key: secret-a", *path),
    ]

    assert [answer.status for answer in answers] == [401, 401, 403, 200, 200]
    assert error_code(answers[2]) == "model_not_allowed"


async def test_a_key_finds_out_no_model_of_others_by_a_name_that_no_upstream_has(start: Start) -> None:
    _, ask = await start(models=("m", "planned"))

    forbidden, planned = await ask("none", SECRET), await ask("planned", SECRET)

    assert (forbidden.status, planned.status) == (403, 404)
    assert error_code(forbidden) == "model_not_allowed"
    assert b'does not exist. Served here: m"' in planned.body
    assert b"other" not in forbidden.body + planned.body


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
async def test_beyond_its_requests_a_key_waits_and_is_told_for_how_long(start: Start, path: tuple[bytes, ...]) -> None:
    _, ask = await start(requests_per_minute=1)

    first, second = await ask("m", SECRET, *path), await ask("m", SECRET, *path)

    assert (first.status, second.status) == (200, 429)
    assert first.fields[b"x-ratelimit-remaining-requests"] == b"0"
    assert error_code(second) == "rate_limit_exceeded"
    assert 0 < int(second.fields[b"retry-after"]) <= 60


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("is_stream", "stream"), [(False, WELL), (True, TELLING)])
async def test_tokens_are_counted_as_the_answer_says(
    start: Start, path: tuple[bytes, ...], is_stream: bool, stream: Step
) -> None:
    proxy, ask = await start(stream, tokens_per_minute=1000)

    await ask("m", SECRET, *path, stream=is_stream)

    metrics = await scrape(proxy)
    assert 'brlite:key_tokens_total{key="team-a",kind="prompt"} 3.0\n' in metrics
    assert 'brlite:key_tokens_total{key="team-a",kind="completion"} 4.0\n' in metrics


async def test_a_key_in_debt_is_refused(start: Start) -> None:
    _, ask = await start(tokens_per_minute=5)

    answers = [await ask("m", SECRET), await ask("m", SECRET)]

    assert [answer.status for answer in answers] == [200, 429]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
async def test_an_idempotency_key_is_another_one_for_each_client(path: tuple[bytes, ...]) -> None:
    keys = tuple(KeyConfig(name=name, key=f"secret-{name}") for name in "ab")
    async with ScriptedUpstream(Step(GOOD_PLAIN), WELL) as upstream:
        config = UpstreamConfig(url=upstream.url, models=("m",), health_path="")
        async with run_proxy(config, key=keys) as proxy:
            for secret in (b"secret-a", b"secret-b", b"secret-a"):
                client = await Client.connect(proxy.port)
                headers = (b"Authorization: Bearer " + secret, b"Idempotency-Key: mine", *path)
                client.send(post({"model": "m"}, *headers))
                await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
                client.leave()
        sent = [request.fields[b"idempotency-key"] for request in upstream.requests]

    assert sent[0] == sent[2] != sent[1]

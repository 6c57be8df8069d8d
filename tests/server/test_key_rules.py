"""Keys with rules of their own, seen from outside: what is refused, what is counted, what is told."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import pytest

from brlite.app import create_app
from brlite.config.options import Config, KeyConfig, LimitsConfig, ModelSpec
from brlite.engine.backend import ScheduledSeq
from brlite.engine.engine import Engine
from brlite.engine.request import Request
from brlite.http.listen import HttpServer
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.fakes import printable_token
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import MODEL, Client, MakeClient, chat_body, completion_body

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SECRET = "sk-team-a"
OPERATOR = KeyConfig(name="operator", key="sk-operator", admin=True)
PROMPT_TOKENS = 11  # of chat_body() in bytes

LimitedClient = Callable[..., Awaitable[Client]]


@pytest.fixture
def limited(make_client: MakeClient) -> LimitedClient:
    """`await limited(max_concurrent=1)` starts a server whose one key has these rules; its client shows the key."""

    async def start(*, backend: dict[str, Any] | None = None, **rules: Any) -> Client:
        key = KeyConfig(name="team-a", key=SECRET, **rules)
        client = await make_client(config={"key": (key, OPERATOR)}, **(backend or {}))
        client.session.headers["Authorization"] = f"Bearer {SECRET}"
        return client

    return start


async def counts(client: Client) -> dict[str, int]:
    """The key's counters in `/metrics`, by their second label."""
    shown = {"Authorization": f"Bearer {OPERATOR.key}"}
    async with client.session.get(client.url + "/metrics", headers=shown) as response:
        text = await response.text()
    assert SECRET not in text
    lines = re.findall(r'^brlite:key_\w+_total\{key="team-a",\w+="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {label: int(float(value)) for label, value in lines}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body()),
        (CHAT, chat_body(stream=True)),
        (COMPLETION, completion_body()),
        (CHAT, chat_body(model="no-such-model")),
        ("/tokenize", {"model": MODEL, "prompt": "hello"}),
        ("/tokenize", {"prompt": "hello"}),
        ("/detokenize", {"model": MODEL, "tokens": [104]}),
    ],
)
async def test_a_model_that_is_not_the_keys_is_a_403_whether_it_exists_or_not(
    limited: LimitedClient, path: str, body: dict[str, Any]
) -> None:
    client = await limited(models=("another",))

    status, answer = await client.post(path, body)

    assert status == 403
    assert answer["error"]["code"] == "model_not_allowed"
    assert answer["error"]["param"] == "model"
    assert answer["error"]["message"].endswith("It may use: another")
    assert (await counts(client))["forbidden"] == 1
    assert client.backend.batches == []


async def test_only_the_keys_models_are_listed() -> None:
    config = Config(key=(KeyConfig(name="team-a", key=SECRET, models=("one",)), KeyConfig(name="all", key="sk-all")))
    table = ModelTable(ServedModel(ModelSpec(name=name)) for name in ("one", "two"))

    async def get(path: str, key: str) -> tuple[int, Any]:
        async with session.get(path, headers={"X-Api-Key": key}) as response:
            return response.status, await response.json()

    app = create_app(table, config)
    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server, aiohttp.ClientSession(server.url) as session:
        lists = {key: (await get("/v1/models", key))[1]["data"] for key in (SECRET, "sk-all")}
        statuses = [(await get(path, SECRET))[0] for path in ("/v1/models/one", "/v1/models/two", "/v1/models/three")]

    assert {key: [card["id"] for card in cards] for key, cards in lists.items()} == {
        SECRET: ["one"],
        "sk-all": ["one", "two"],
    }
    assert statuses == [200, 403, 403]


async def test_requests_of_all_kinds_share_one_budget_and_a_refusal_says_when(limited: LimitedClient) -> None:
    client = await limited(requests_per_minute=4)
    await client.chat()
    await client.complete()
    await client.post("/tokenize", {"prompt": "x"})
    await client.post("/detokenize", {"tokens": [104]})

    async with client.session.post(client.url + CHAT, json=chat_body()) as response:
        answer, headers = await response.json(), response.headers

    assert response.status == 429
    assert answer["error"]["code"] == "rate_limit_exceeded"
    assert "4 requests a minute (requests_per_minute)" in answer["error"]["message"]
    assert 0 < int(headers["Retry-After"]) <= 15
    assert headers["x-ratelimit-limit-requests"] == "4"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    found = await counts(client)
    assert (found["admitted"], found["rate_limited"]) == (4, 1)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_answer_tells_what_is_left(limited: LimitedClient, is_streamed: bool) -> None:
    client = await limited(requests_per_minute=10, tokens_per_minute=10**6)

    async with client.session.post(client.url + CHAT, json=chat_body(stream=is_streamed)) as response:
        headers = response.headers
        await response.read()

    assert headers["x-ratelimit-limit-requests"] == "10"
    assert headers["x-ratelimit-remaining-requests"] == "9"
    assert re.fullmatch(r"[0-9.]+m?s", headers["x-ratelimit-reset-requests"])
    assert headers["x-ratelimit-limit-tokens"] == "1000000"


async def test_a_key_without_limits_gets_no_such_headers(limited: LimitedClient) -> None:
    client = await limited()

    async with client.session.post(client.url + CHAT, json=chat_body()) as response:
        assert response.status == 200

    assert not [name for name in response.headers if name.lower().startswith("x-ratelimit")]


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, chat_body(n=2, max_tokens=8)), (COMPLETION, completion_body(["a", "b"], max_tokens=8))]
)
async def test_prompts_and_answers_are_charged_whole_or_streamed(
    limited: LimitedClient, path: str, body: dict[str, Any]
) -> None:
    client = await limited(tokens_per_minute=10**6)

    _, answer = await client.post(path, body)
    once = await counts(client)
    await client.stream(path, body)
    twice = await counts(client)

    assert once["prompt"] == answer["usage"]["prompt_tokens"]
    assert once["completion"] == answer["usage"]["completion_tokens"] == 16
    assert (twice["prompt"], twice["completion"]) == (2 * once["prompt"], 2 * once["completion"])


async def test_the_metrics_have_the_weight_and_the_times_of_a_key(limited: LimitedClient) -> None:
    client = await limited(weight=3, priority=-2)

    await client.chat()
    shown = {"Authorization": f"Bearer {OPERATOR.key}"}
    async with client.session.get(client.url + "/metrics", headers=shown) as response:
        metrics = await response.text()

    assert 'brlite:key_weight{key="team-a"} 3.0\n' in metrics
    assert 'brlite:key_priority{key="team-a"} -2.0\n' in metrics
    seconds = dict(re.findall(r'brlite:key_seconds_total{key="team-a",phase="([a-z]+)"} ([0-9.e-]+)\n', metrics))
    assert list(seconds) == ["queue", "prefill", "decode"]
    assert sum(map(float, seconds.values())) > 0


@pytest.mark.parametrize(("wanted", "obeyed"), [(None, -2), (-2, -2), (7, 7), (-3, -2)])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
async def test_a_request_may_put_itself_behind_its_keys_class_and_not_before(
    limited: LimitedClient, monkeypatch: pytest.MonkeyPatch, path: str, wanted: int | None, obeyed: int
) -> None:
    client = await limited(priority=-2, backend={"hidden_size": 4})
    seen, add = list[int](), Engine.add_request

    def add_request(engine: Engine, request: Request, *sinks: Any) -> None:
        seen.append(request.priority)
        add(engine, request, *sinks)

    monkeypatch.setattr(Engine, "add_request", add_request)
    body = chat_body() if path == CHAT else {"model": MODEL, "input": "hi"}

    status, answer = await client.post(path, {**body, "priority": wanted})

    assert (status, seen) == (200, [obeyed])
    told = ["priority -3 was raised to -2, the lowest that this key may have"] if wanted == -3 else []
    assert answer.get("warnings", []) == told


async def test_a_priority_that_is_not_allowed_is_refused_by_a_strict_request(limited: LimitedClient) -> None:
    client = await limited()

    status, answer = await client.post(CHAT, chat_body(priority=-1, strict=True))

    assert (status, answer["error"]["code"]) == (400, "strict")
    assert "priority -1 was raised to 0" in answer["error"]["message"]


async def test_models_are_unloaded_with_an_operators_key_only(limited: LimitedClient) -> None:
    client = await limited()

    status, answer = await client.post("/models/unload", {"model": MODEL})
    by_operator, _ = await client.post("/models/unload", {"model": MODEL}, Authorization=f"Bearer {OPERATOR.key}")

    assert (status, answer["error"]["type"]) == (403, "permission_error")
    assert answer["error"]["code"] == "operator_key_required"
    assert by_operator == 400  # it is loaded at the start


async def test_who_is_in_debt_for_tokens_waits(limited: LimitedClient) -> None:
    client = await limited(tokens_per_minute=PROMPT_TOKENS + 2)
    await client.chat(max_tokens=8)

    status, answer = await client.post(CHAT, chat_body())

    assert status == 429
    assert "(tokens_per_minute)" in answer["error"]["message"]
    assert (await counts(client))["completion"] == 8


class Stall:
    """A model that stops before its sixth token, until it is let go on."""

    def __init__(self) -> None:
        self.is_reached, self.may_go_on = threading.Event(), threading.Event()

    def next_token(self, context: Sequence[int], seed: int) -> int:
        if len(context) == PROMPT_TOKENS + 5:
            self.is_reached.set()
            self.may_go_on.wait(PATIENCE_SECONDS)
        return printable_token(context, seed)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_client_that_leaves_gives_its_place_back_and_has_used_what_was_computed(
    limited: LimitedClient, is_streamed: bool
) -> None:
    stall = Stall()
    client = await limited(max_concurrent=1, backend={"next_token": stall.next_token})
    running = asyncio.create_task(client.post(CHAT, chat_body(max_tokens=40, stream=is_streamed)))
    await asyncio.to_thread(stall.is_reached.wait, 10)
    status, answer = await client.post(CHAT, chat_body())

    running.cancel()
    await asyncio.wait_for(until_charged(client), PATIENCE_SECONDS)
    stall.may_go_on.set()
    await client.engine.wait_idle()

    assert status == 429
    assert "1 requests at once (max_concurrent)" in answer["error"]["message"]
    found = await counts(client)
    assert (found["prompt"], found["completion"]) == (PROMPT_TOKENS, 6) == spent(client)
    await client.chat()


def spent(client: Client) -> tuple[int, int]:
    """The tokens of prompts and answers that the engine has computed."""
    return client.engine.stats.prompt_tokens, client.engine.stats.generation_tokens


async def test_a_client_that_leaves_in_the_step_of_its_prompt_has_used_what_was_computed(
    limited: LimitedClient, eventually: Eventually
) -> None:
    client = await limited()
    client.backend.gate = threading.Event()
    running = [asyncio.create_task(client.post(CHAT, chat_body(stream=each))) for each in (False, True)]
    await eventually(lambda: client.engine.stats.num_running > 0)

    for each in running:
        each.cancel()
    await eventually(lambda: not client.server.num_connections)
    client.backend.gate.set()
    await client.engine.wait_idle()

    found = await counts(client)
    assert (found["prompt"], found["completion"]) == spent(client) != (0, 0)


SEARCH = {"use_beam_search": True, "temperature": 0, "best_of": 3, "max_tokens": 8}


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_beam_search_is_charged_for_all_its_beams(limited: LimitedClient, is_streamed: bool) -> None:
    client = await limited()

    async with client.session.post(
        client.url + COMPLETION, json=completion_body(stream=is_streamed, **SEARCH)
    ) as response:
        text = await response.text()

    assert '"finish_reason":"length"' in text
    assert (await counts(client))["completion"] == 1 + 7 * 3


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_client_that_leaves_a_beam_search_has_used_what_was_computed(
    limited: LimitedClient, is_streamed: bool
) -> None:
    stall = Stall()
    client = await limited(backend={"next_token": stall.next_token})
    body = completion_body("x" * PROMPT_TOKENS, stream=is_streamed, **SEARCH)
    running = asyncio.create_task(client.post(COMPLETION, body))
    assert await asyncio.to_thread(stall.is_reached.wait, PATIENCE_SECONDS)

    running.cancel()
    await asyncio.wait([running])
    stall.may_go_on.set()
    await asyncio.wait_for(until_charged(client), PATIENCE_SECONDS)

    found = await counts(client)
    assert found["prompt"] == PROMPT_TOKENS
    assert found["completion"] >= 1 + 4 * 3


async def until_charged(client: Client) -> None:
    while not (await counts(client))["prompt"]:
        pass


async def test_a_request_that_fails_counts_with_its_tokens_and_gives_its_place_back(limited: LimitedClient) -> None:
    def fault(seq: ScheduledSeq) -> str | None:
        return "logits are not finite" if seq.start > PROMPT_TOKENS else None

    client = await limited(max_concurrent=1, backend={"fault": fault})

    statuses = [(await client.post(CHAT, chat_body()))[0] for _ in range(2)]
    bad, _ = await client.post(CHAT, chat_body(temperature=-1))

    assert [*statuses, bad] == [500, 500, 400]
    found = await counts(client)
    assert (found["admitted"], found["rate_limited"]) == (2, 0)  # a bad field is refused before
    assert (found["prompt"], found["completion"]) == (2 * PROMPT_TOKENS, 4)


async def test_the_log_names_the_key_and_does_not_show_it(
    limited: LimitedClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    client = await limited(models=(MODEL,))

    await client.chat()
    await client.post(CHAT, chat_body(model="another"))

    lines = [record.getMessage() for record in caplog.records if record.name == "brlite.access"]
    assert [" key=team-a" in line for line in lines] == [True, True]
    assert SECRET not in caplog.text


async def test_plain_keys_and_open_servers_have_no_counters(make_client: MakeClient) -> None:
    client = await make_client()
    await client.chat()

    assert await counts(client) == {}

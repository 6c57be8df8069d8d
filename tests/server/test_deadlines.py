"""Requests that say how long they may take, and what the log says of where the time of a request went."""

from __future__ import annotations

import asyncio
import re
import threading
from array import array
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.engine.scoring import ScoringHead
from brlite.http.events import EventStream
from brlite.http.listen import HttpServer
from brlite.server.generate import RUNNING, timed_out
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.fakes import HIDDEN_SIZE, FakeBackend
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient, chat_body, completion_body
from tests.server.test_background import GatedTokenizer

ENDPOINTS = [
    ("/v1/chat/completions", chat_body()),
    ("/v1/completions", completion_body()),
    ("/v1/responses", {"input": "hi"}),
]
OF_PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": ["hi"] * 9}),
    ("/pooling", {"input": "hi"}),
    ("/v1/score", {"text_1": "hi", "text_2": ["a", "b"]}),
    ("/v1/rerank", {"query": "hi", "documents": ["a"] * 9}),
]


@pytest.fixture
async def stuck(client: Client) -> AsyncIterator[Client]:
    """A server whose model computes nothing until the test is over."""
    client.backend.gate = threading.Event()
    yield client
    client.backend.gate.set()


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_a_request_ends_with_408_at_its_timeout(stuck: Client, path: str, body: dict[str, Any]) -> None:
    in_body = await stuck.post(path, {**body, "timeout": 0.05})
    in_header = await stuck.post(path, body, **{"X-Request-Timeout": "0.05"})
    body_first = await stuck.post(path, {**body, "timeout": 0.05}, **{"X-Request-Timeout": "3600"})

    for status, answer in (in_body, in_header, body_first):
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (408, "request_timeout", "timeout")
        assert "its timeout of 0.05 s" in answer["error"]["message"]


@pytest.mark.parametrize(("path", "body"), OF_PROMPTS)
async def test_embeddings_and_scores_end_at_their_timeout_and_are_aborted(
    make_client: MakeClient, eventually: Eventually, path: str, body: dict[str, Any]
) -> None:
    stuck = await make_client(scoring_head=ScoringHead(array("f", [1.0] * HIDDEN_SIZE)))
    stuck.backend.gate = threading.Event()

    in_body = await stuck.post(path, {**body, "timeout": 0.05})
    in_header = await stuck.post(path, body, **{"X-Request-Timeout": "0.05"})
    wrong, refusal = await stuck.post(path, body, **{"X-Request-Timeout": "-1"})
    stuck.backend.gate.set()
    status, _ = await stuck.post(path, {**body, "timeout": 3600})
    await eventually(lambda: not stuck.engine.stats.num_running)

    for code, answer in (in_body, in_header):
        assert (code, answer["error"]["code"], answer["error"]["param"]) == (408, "request_timeout", "timeout")
    assert (wrong, refusal["error"]["param"], status) == (400, "X-Request-Timeout", 200)
    assert stuck.engine.stats.num_waiting == 0


async def test_a_client_is_told_not_to_retry_what_its_own_timeout_ended(stuck: Client) -> None:
    body = {**chat_body(), "timeout": 0.05}

    async with stuck.session.post(stuck.url + "/v1/chat/completions", json=body) as response:
        assert response.status == 408

    assert response.headers["X-Should-Retry"] == "false"


async def test_a_stream_that_has_begun_ends_with_an_error_event(stuck: Client) -> None:
    for seconds in (0.1, 2.5, PATIENCE_SECONDS / 2):  # on a busy machine it may be over before the stream has begun
        body = chat_body(stream=True, timeout=seconds)
        async with stuck.session.post(stuck.url + "/v1/chat/completions", json=body) as response:
            text = await response.text()
        if response.status == 200:
            break

    assert response.status == 200
    assert f"its timeout of {seconds:g} s" in text
    assert text.endswith("data: [DONE]\n\n")


async def test_an_error_comes_behind_the_deltas_that_a_slow_client_has_not_taken(
    client: Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(stream: EventStream, seconds: float) -> bool:
        waits.set()
        await asyncio.Event().wait()
        return True

    waits = asyncio.Event()
    monkeypatch.setattr(EventStream, "is_backlogged", True)
    monkeypatch.setattr(EventStream, "drained", never)
    async with client.session.post(client.url + "/v1/chat/completions", json=chat_body(stream=True)) as response:
        await asyncio.wait_for(waits.wait(), PATIENCE_SECONDS)
        (call,) = client.server._app[RUNNING]
        call.fail(timed_out(1))
        text = await response.text()

    delta = re.search(r'"content":"[^"]', text)  # the first event has none
    assert delta is not None
    assert delta.start() < text.index("its timeout of 1 s")


async def test_an_error_behind_the_end_of_a_call_does_not_cut_its_last_events(
    client: Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = EventStream.finish

    async def fail_first(stream: EventStream, last_events: bytes = b"") -> web.StreamResponse:
        call.fail(timed_out(1))
        await asyncio.sleep(0)
        return await finish(stream, last_events)

    monkeypatch.setattr(EventStream, "finish", fail_first)
    client.backend.gate = threading.Event()
    async with client.session.post(client.url + "/v1/chat/completions", json=chat_body(stream=True)) as response:
        await eventually(lambda: client.engine.stats.num_running == 1)
        (call,) = client.server._app[RUNNING]
        client.backend.gate.set()
        text = await response.text()

    assert "its timeout" not in text
    assert text.endswith("data: [DONE]\n\n")


async def test_a_request_within_its_timeout_is_untouched(client: Client) -> None:
    assert await client.chat(timeout=3600)


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "1e9"])
async def test_a_timeout_out_of_its_range_is_refused(
    client: Client, path: str, body: dict[str, Any], seconds: str
) -> None:
    status, answer = await client.post(path, body, **{"X-Request-Timeout": seconds})
    assert (status, answer["error"]["param"]) == (400, "X-Request-Timeout")

    if seconds not in ("soon", "nan"):
        status, answer = await client.post(path, {**body, "timeout": float(seconds)})
        assert (status, answer["error"]["param"]) == (400, "timeout")


async def test_a_timeout_ends_the_wait_for_a_model_that_is_being_loaded() -> None:
    spec = ModelSpec(name="fake", load="on_demand")
    config = Config(model=(spec,), limits=LimitsConfig())
    app = create_app(ModelTable([ServedModel(spec)]), config)  # without a manager nothing ever loads it

    async with (
        HttpServer(app, "127.0.0.1", 0, config.limits) as server,
        aiohttp.ClientSession() as session,
        session.post(server.url + "/v1/chat/completions", json=chat_body(timeout=0.05)) as response,
    ):
        assert response.status == 408


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("is_loaded_first", [True, False])
async def test_a_timeout_in_the_turn_in_which_the_load_ends_also_ends_the_encoding(
    eventually: Eventually, path: str, body: dict[str, Any], is_loaded_first: bool
) -> None:
    tokenizer, backend = GatedTokenizer(), FakeBackend()
    tokenizer.encodes_in_process = False  # it encodes on another thread, which waits for the gate
    model = ServedModel(ModelSpec(name="fake", load="on_demand"))
    app = create_app(ModelTable([model]), Config(model=(model.spec,)))
    engine = EngineLoop(Engine(backend.info, tokenizer, EngineConfig(), LimitsConfig()), backend)  # type: ignore[arg-type]

    async with (
        engine,
        HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        asking = asyncio.create_task(session.post(path, json={**body, "timeout": 3600}))
        await eventually(lambda: model.loading.num_waiting == 1)
        (delivery,) = app[RUNNING]
        events = [lambda: model.take(engine), lambda: delivery.fail(timed_out(3600))]
        for event in events if is_loaded_first else reversed(events):
            event()
        response = await asyncio.wait_for(asking, PATIENCE_SECONDS)
        tokenizer.gate.set()

    assert response.status == 408
    assert model.num_requests == 0


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_the_log_has_a_usage_record_of_each_request(
    client: Client, path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "brlite.access")

    for _ in range(2):
        await client.post(path, body)

    records = [re.findall(r"(\w+)=([\d.]+)(?= |$)", line) for line in caplog.messages]
    first, second = (dict(record) for record in records)
    assert int(first["prompt_tokens"]) == int(second["prompt_tokens"]) > 0
    num_cached = (int(first["prompt_tokens"]) - 1) // 4 * 4  # whole blocks, before the last token
    assert (int(first["cached_tokens"]), int(second["cached_tokens"])) == (0, num_cached)
    assert int(first["completion_tokens"]) > 0
    assert all(float(first[name]) >= 0 for name in ("queue_s", "prefill_s", "decode_s"))


async def test_the_times_of_a_request_add_up_to_its_whole_time(client: Client) -> None:
    outputs = [output async for output in client.engine.generate(list(b"hello"))]

    assert [output.times is not None for output in outputs] == [output.finished for output in outputs]
    times, stats = outputs[-1].times, client.engine.stats
    assert times is not None
    assert times.queue + times.prefill + times.decode == pytest.approx(stats.e2e_latency.total)
    assert (times.queue, times.decode) == pytest.approx((stats.queue_time.total, stats.decode_time.total))

"""Retries with an `Idempotency-Key`, over real sockets: joined, replayed, or computed anew; never twice."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from brlite.config.options import Config, KeysConfig, LimitsConfig
from brlite.dialects.dialect import Dialect
from brlite.dialects.kept_events import KeptEvents
from brlite.dialects.openai_chat import DIALECT
from brlite.http.body import HELD, BodyBudget, HeldBody
from brlite.http.bounded_store import BoundedStore
from brlite.http.events import EventStream
from brlite.http.keys import ApiKeys
from brlite.server.event_builder import EventBuilder
from brlite.server.generate import Streaming
from brlite.server.idempotency import ANSWERS, IdempotentAnswers, StoredAnswer
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

CHAT = "/v1/chat/completions"
ENDPOINTS = [(CHAT, chat_body()), ("/v1/completions", completion_body()), ("/v1/responses", {"input": "hi"})]


async def send(client: Client, path: str, body: dict[str, Any], key: str = "k", **headers: str) -> tuple[bytes, bool]:
    """The body of the answer, and whether it was replayed."""
    headers = {"Idempotency-Key": key, **headers}
    async with client.session.post(client.url + path, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        return await response.read(), response.headers.get("Idempotent-Replayed") == "true"


def num_computed(client: Client) -> int:
    return sum(client.engine.stats.finished.values())


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_a_retry_gets_the_stored_answer(
    client: Client, path: str, body: dict[str, Any], is_streamed: bool
) -> None:
    body = {**body, "stream": is_streamed, "temperature": 1}

    first, second = await send(client, path, body), await send(client, path, body)
    other, _ = await send(client, path, body, key="other")

    assert (first[1], second) == (False, (first[0], True))
    assert other != first[0]
    assert num_computed(client) == 2


async def test_a_client_that_does_not_read_has_few_events_of_a_stored_stream_in_memory(
    client: Client, eventually: Eventually
) -> None:
    body = chat_body(stream=True)
    await send(client, CHAT, body)
    stored, kept = client.server._app[ANSWERS].store.get("", "k"), KeptEvents()
    assert stored is not None
    kept.add(b"data: %b\n\n" % (b"x" * 8000) * 4000)
    kept.finish()
    client.server._app[ANSWERS].store.put("", "k", StoredAnswer(stored.digest, kept), 1)

    headers = {"Idempotency-Key": "k"}
    async with client.session.post(client.url + CHAT, json=body, headers=headers, read_bufsize=1024) as response:
        await eventually(lambda: client.unsent_bytes > 0)

        assert client.unsent_bytes < 10**6
        response.close()


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_retry_joins_the_request_that_is_running(
    client: Client, is_streamed: bool, eventually: Eventually
) -> None:
    client.backend.gate = threading.Event()
    body = chat_body(stream=is_streamed)

    both = [asyncio.create_task(send(client, CHAT, body)) for _ in range(2)]
    await eventually(lambda: client.engine.stats.num_running > 0)
    client.backend.gate.set()
    (first, _), (second, _) = await asyncio.wait_for(asyncio.gather(*both), PATIENCE_SECONDS)

    assert first == second
    assert num_computed(client) == 1


async def test_an_answer_whose_client_left_waits_for_the_retry(client: Client, eventually: Eventually) -> None:
    client.backend.gate = threading.Event()
    lost = asyncio.create_task(send(client, CHAT, chat_body()))
    await eventually(lambda: client.engine.stats.num_running > 0)
    lost.cancel()

    retry = asyncio.create_task(send(client, CHAT, chat_body()))
    client.backend.gate.set()
    await asyncio.wait_for(retry, PATIENCE_SECONDS)

    assert num_computed(client) == 1
    assert client.engine.stats.finished["abort"] == 0


async def test_a_stream_whose_client_left_begins_anew(client: Client, eventually: Eventually) -> None:
    client.backend.gate = threading.Event()
    body = chat_body(stream=True)
    async with client.session.post(client.url + CHAT, json=body, headers={"Idempotency-Key": "k"}) as response:
        assert response.status == 200  # and leave before the first token
    client.backend.gate.set()
    await eventually(lambda: client.engine.stats.finished["abort"] == 1)

    answer, is_replayed = await send(client, CHAT, body)

    assert (answer.endswith(b"data: [DONE]\n\n"), is_replayed) == (True, False)


async def test_a_stream_that_could_not_be_written_to_its_end_is_not_stored(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(EventStream, "write", lambda stream, events: False)  # as for a client that has left
        await send(client, CHAT, chat_body(stream=True))

    answer, is_replayed = await send(client, CHAT, chat_body(stream=True))

    assert (answer.endswith(b"data: [DONE]\n\n"), is_replayed) == (True, False)


async def test_a_failure_is_not_stored(make_client: MakeClient) -> None:
    faults = ["logits are not finite", None]
    client = await make_client(fault=lambda seq: faults.pop(0) if faults else None)

    status, _ = await client.post(CHAT, chat_body(), **{"Idempotency-Key": "k"})
    answer, is_replayed = await send(client, CHAT, chat_body())

    assert status == 500
    assert (b"chat.completion" in answer, is_replayed) == (True, False)


async def test_a_key_is_of_one_request_only(client: Client) -> None:
    await send(client, CHAT, chat_body("a"))

    for path, body in ((CHAT, chat_body("b")), ("/v1/completions", completion_body())):
        status, answer = await client.post(path, body, **{"Idempotency-Key": "k"})
        assert (status, answer["error"]["code"]) == (400, "idempotency_key_reused")
    status, answer = await client.post(CHAT, chat_body(), **{"Idempotency-Key": "k" * 256})
    assert (status, answer["error"]["param"]) == (400, "Idempotency-Key")


async def test_clients_of_other_api_keys_get_answers_of_their_own(make_client: MakeClient) -> None:
    client = await make_client(config={"keys": KeysConfig(keys=("a", "b"))})

    mine, _ = await send(client, CHAT, chat_body(), Authorization="Bearer a")
    other, is_replayed = await send(client, CHAT, chat_body(), Authorization="Bearer b")

    assert (mine != other, is_replayed) == (True, False)


async def test_without_room_every_request_is_computed(make_client: MakeClient) -> None:
    client = await make_client(limits={"max_idempotent_bytes": 0})

    assert [(await send(client, CHAT, chat_body()))[1] for _ in range(2)] == [False, False]


def test_a_full_store_forgets_the_oldest_of_the_tenant_that_holds_most(caplog: pytest.LogCaptureFixture) -> None:
    store: BoundedStore[int] = BoundedStore(100, name="max_things", what="things")
    store.put("b", "0", 0, 30)

    for number in range(1, 5):
        store.put("a", str(number), number, 30)

    assert [store.get("a", str(number)) for number in range(1, 5)] == [None, None, 3, 4]
    assert (store.get("b", "0"), store.num_bytes, store.num_forgotten, len(store)) == (0, 90, 2, 3)
    assert "limits.max_things = 100" in caplog.text


def test_a_value_larger_than_the_store_is_not_kept_and_its_tenant_leaves_nothing() -> None:
    store: BoundedStore[int] = BoundedStore(100, name="max_things", what="things")

    store.put("a", "1", 1, 50)
    store.put("a", "1", 2, 101)

    assert (store.get("a", "1"), store.num_bytes, len(store)) == (None, 0, 0)
    assert store.pop("a", "1") is None


async def test_what_runs_without_a_client_is_ended_when_the_server_stops() -> None:
    answers, begun, ended = IdempotentAnswers(LimitsConfig()), asyncio.Event(), asyncio.Event()

    async def run(dialect: Dialect, request: web.Request) -> web.StreamResponse:
        begun.set()
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    request = make_mocked_request("POST", CHAT, headers={"Idempotency-Key": "k"})
    budget = BodyBudget(100)
    held = request[HELD] = HeldBody(budget, ApiKeys.from_config(Config()).anybody)
    held.take(2)
    handler = asyncio.create_task(answers.answer(DIALECT, request, b"{}", "tenant", run))
    await asyncio.wait_for(begun.wait(), PATIENCE_SECONDS)
    handler.cancel()
    await asyncio.wait([handler])
    held.release()  # as the middleware does
    assert not ended.is_set()
    assert budget.num_bytes == 2  # the body is in memory while the answer is computed

    await answers.close(0.0)

    assert ended.is_set()  # `close` has waited for the cancelled task
    assert budget.num_bytes == 0


def test_a_value_that_grows_counts_and_displaces_the_oldest() -> None:
    store: BoundedStore[int] = BoundedStore(100, name="max_things", what="things")
    store.put("a", "old", 1, 40)
    store.put("a", "new", 2, 40)

    assert store.grow("a", "new", 20)
    assert (store.num_bytes, store.get("a", "old")) == (100, 1)
    assert store.grow("a", "new", 1)
    assert (store.num_bytes, store.get("a", "old")) == (61, None)
    assert not store.grow("a", "new", 40)
    assert not store.grow("a", "new", 1)
    assert (store.num_bytes, len(store)) == (0, 0)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_bug_is_logged_that_no_client_sees(
    client: Client,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    is_streamed: bool,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(EventBuilder, "whole", fail)
    monkeypatch.setattr(Streaming, "_send_all", fail)
    client.backend.gate = threading.Event()
    headers = {"Idempotency-Key": "k", **({"Last-Event-ID": "0"} if is_streamed else {})}
    path, body = client.url + "/v1/chat/completions", chat_body(stream=is_streamed)
    asking = asyncio.create_task(client.session.post(path, json=body, headers=headers))
    if is_streamed:
        await (await asking).read()
    else:
        await eventually(lambda: client.engine.stats.num_running == 1)
        asking.cancel()
        await eventually(lambda: client.server.num_connections == 0)
    client.backend.gate.set()

    await eventually(lambda: "a bug" in caplog.text)

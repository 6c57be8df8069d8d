"""Streams that are resumed with `Last-Event-ID`, over real sockets: no event twice, none missing, computed once."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from aiohttp import web

from brlite.config.options import KeysConfig, LimitsConfig
from brlite.dialects.kept_events import STATE_BYTES, KeptEvents
from brlite.http.listen import HttpServer
from brlite.server.idempotency import ANSWERS
from brlite.server.resumable import RecordedStream
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

CHAT = "/v1/chat/completions"
ENDPOINTS = [
    (CHAT, chat_body()),
    ("/v1/completions", completion_body()),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {**chat_body(), "max_tokens": 16}),
]
EVENT = re.compile(rb"id: ([0-9]+)\n((?:event: [a-z_.]+\n)?data: [^\n]+\n\n)")


async def ask(
    client: Client, body: dict[str, Any], num_seen: int, path: str = CHAT, **headers: str
) -> dict[int, bytes]:
    """The events by their ids."""
    headers = {"Idempotency-Key": "k", "Last-Event-ID": str(num_seen), **headers}
    async with client.session.post(client.url + path, json=body, headers=headers) as response:
        text = await response.read()
    assert response.status == 200, text
    assert EVENT.sub(b"", text) == b""
    return {int(number): event for number, event in EVENT.findall(text)}


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_the_events_behind_the_last_one_that_came_are_sent_again(
    client: Client, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "stream": True}

    events = await ask(client, body, 0, path)
    rest = await ask(client, body, 2, path)
    async with client.session.post(client.url + path, json=body, headers={"Idempotency-Key": "k"}) as response:
        plain = await response.read()

    assert list(events) == list(range(1, len(events) + 1))
    assert rest == {number: event for number, event in events.items() if number > 2}
    assert plain == b"".join(events.values())
    assert sum(client.engine.stats.finished.values()) == 1


async def test_a_stream_goes_on_without_its_client_and_the_next_one_follows_it(
    client: Client, eventually: Eventually
) -> None:
    client.backend.gate = threading.Event()
    body = chat_body(stream=True)
    headers = {"Idempotency-Key": "k", "Last-Event-ID": "0"}
    async with client.session.post(client.url + CHAT, json=body, headers=headers) as response:
        first = await response.content.readuntil(b"\n\n")  # and leave

    both = [asyncio.create_task(ask(client, body, num_seen)) for num_seen in (0, 1)]
    await eventually(lambda: client.engine.stats.num_running > 0)
    client.backend.gate.set()
    whole, rest = await asyncio.wait_for(asyncio.gather(*both), PATIENCE_SECONDS)

    assert b"id: 1\n" + whole.pop(1) == first
    assert rest == whole
    assert whole[max(whole)] == b"data: [DONE]\n\n"
    assert client.engine.stats.finished["abort"] == 0
    assert sum(client.engine.stats.finished.values()) == 1


async def test_a_refusal_before_the_first_event_has_its_own_status(client: Client) -> None:
    body = {**chat_body(stream=True), "top_p": 5}
    status, answer = await client.post(CHAT, body, **{"Idempotency-Key": "k", "Last-Event-ID": "0"})

    assert (status, answer["error"]["param"]) == (400, "top_p")
    assert await ask(client, chat_body(stream=True), 0)


async def test_what_cannot_be_resumed_is_refused(make_client: MakeClient) -> None:
    client = await make_client(config={"keys": KeysConfig(keys=("a", "b"))})
    body = chat_body(stream=True)
    mine = {"Authorization": "Bearer a", "Idempotency-Key": "k"}
    events = await ask(client, body, 0, Authorization="Bearer a")
    refused = [
        {**mine, "Last-Event-ID": str(len(events) + 1)},
        {**mine, "Last-Event-ID": "-1"},
        {**mine, "Last-Event-ID": "9" * 30},
        {**mine, "Last-Event-ID": "1", "Idempotency-Key": "other"},
        {**mine, "Last-Event-ID": "1", "Authorization": "Bearer b"},
    ]

    answers = [await client.post(CHAT, body, **headers) for headers in refused]

    assert [status for status, _ in answers] == [400] * 5
    assert {answer["error"]["param"] for _, answer in answers} == {"Last-Event-ID"}
    assert [answer["error"]["code"] for _, answer in answers[3:]] == ["stream_not_resumable"] * 2


async def test_a_stream_that_failed_tells_so_and_is_not_resumed(make_client: MakeClient) -> None:
    faults = ["logits are not finite", None]
    client = await make_client(fault=lambda seq: faults.pop(0) if faults else None)
    body = chat_body(stream=True)

    failed = await ask(client, body, 0)
    kept_bytes = client.server._app[ANSWERS].store.num_bytes
    status, answer = await client.post(CHAT, body, **{"Idempotency-Key": "k", "Last-Event-ID": "1"})
    again = await ask(client, body, 0)

    assert any(b'"error"' in event for event in failed.values())
    assert kept_bytes == 0
    assert (status, answer["error"]["code"]) == (400, "stream_not_resumable")
    assert not any(b'"error"' in event for event in again.values())


async def test_a_stream_keeps_no_more_events_than_answers_for_retries_may_have(
    make_client: MakeClient, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()

    def next_token(context: Sequence[int], seed: int) -> int:
        if len(context) == 100:
            go_on.wait(PATIENCE_SECONDS)
        return 97

    client = await make_client(
        limits={"max_idempotent_bytes": STATE_BYTES + 600}, next_token=next_token, max_model_len=256, num_blocks=64
    )
    body = completion_body(stream=True, max_tokens=120)
    headers = {"Idempotency-Key": "k", "Last-Event-ID": "1"}
    store = client.server._app[ANSWERS].store
    whole = asyncio.create_task(ask(client, body, 0, "/v1/completions"))
    await eventually(lambda: client.engine.stats.generation_tokens >= 100 - len(b"hello"))

    forgotten = await client.post("/v1/completions", body, **headers)
    go_on.set()
    events = await asyncio.wait_for(whole, PATIENCE_SECONDS)
    after = await client.post("/v1/completions", body, **headers)

    assert len(events) > 120
    for status, answer in (forgotten, after):
        assert (status, answer["error"]["code"]) == (400, "stream_not_resumable")
    assert "the store of answers for retries is full (limits.max_idempotent_bytes" in caplog.text
    assert store.num_bytes == 0


async def test_a_client_that_does_not_read_has_few_of_the_events_in_memory(eventually: Eventually) -> None:
    limits, waiting = LimitsConfig(), list[asyncio.Transport]()
    recorded, kept = RecordedStream(), KeptEvents()
    recorded.keep(kept)
    kept.add(b"data: %b\n\n" % (b"x" * 8000) * 4000)
    recorded.end()

    async def follow(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        waiting.append(request.transport)
        return await recorded.follow(request, 0, limits, has_ids=True)

    app = web.Application()
    app.router.add_get("/", follow)
    async with HttpServer(app, "127.0.0.1", 0, limits, grace_seconds=0.2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await eventually(lambda: bool(waiting) and waiting[0].get_write_buffer_size() > 0)

        assert waiting[0].get_write_buffer_size() < 10**6
        writer.transport.abort()

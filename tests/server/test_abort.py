"""`DELETE /v1/requests/{id}`: a request ends with what it has, for its own key only. What a client leaves behind."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from brlite.config.options import KeysConfig
from brlite.http.body import BODIES
from brlite.server.generate import MODELS, RUNNING
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

CHAT = "/v1/chat/completions"


async def abort(client: Client, name: str, **headers: str) -> int:
    async with client.session.delete(f"{client.url}/v1/requests/{name}", headers=headers) as response:
        return response.status


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [(CHAT, chat_body(), "abort"), ("/v1/responses", {"input": "hi"}, "incomplete")],
)
async def test_a_request_that_is_aborted_ends_with_what_it_has(
    client: Client, eventually: Eventually, path: str, body: dict[str, Any], reason: str
) -> None:
    client.backend.gate = threading.Event()
    request = asyncio.create_task(client.post(path, body, **{"X-Request-Id": "mine"}))
    await eventually(lambda: client.engine.stats.num_running > 0)

    status = await abort(client, "mine")
    client.backend.gate.set()
    answered, answer = await asyncio.wait_for(request, PATIENCE_SECONDS)

    assert (status, answered) == (200, 200)
    assert reason in (answer.get("status"), answer.get("choices", [{}])[0].get("finish_reason"))
    assert client.engine.stats.finished["abort"] == 1
    assert await abort(client, "mine") == 404


async def test_a_stream_is_aborted_by_the_id_that_its_events_have(client: Client) -> None:
    client.backend.gate = threading.Event()
    body = {"input": "hi", "stream": True}
    async with client.session.post(client.url + "/v1/responses", json=body) as response:
        assert await response.content.readline() == b"event: response.created\n"
        created = json.loads((await response.content.readline()).removeprefix(b"data: "))
        status = await abort(client, created["response"]["id"])
        client.backend.gate.set()
        text = await response.text()

    assert status == 200
    assert "event: response.incomplete\n" in text


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_aborted_answer_is_not_the_answer_of_a_retry(
    client: Client, eventually: Eventually, is_streamed: bool
) -> None:
    client.backend.gate = threading.Event()
    headers, body = {"Idempotency-Key": "k", "X-Request-Id": "mine"}, chat_body(stream=is_streamed)

    async def send() -> bytes:
        async with client.session.post(client.url + CHAT, json=body, headers=headers) as response:
            return await response.read()

    request = asyncio.create_task(send())
    await eventually(lambda: client.engine.stats.num_running > 0)
    await abort(client, "mine")
    client.backend.gate.set()
    aborted = await asyncio.wait_for(request, PATIENCE_SECONDS)
    retried = await asyncio.wait_for(send(), PATIENCE_SECONDS)

    assert b'"finish_reason":"abort"' in aborted
    assert b'"finish_reason":"abort"' not in retried


async def test_another_keys_request_is_not_found(make_client: MakeClient, eventually: Eventually) -> None:
    client = await make_client(config={"keys": KeysConfig(keys=("a", "b"))})
    client.backend.gate = threading.Event()
    headers = {"X-Request-Id": "mine", "Authorization": "Bearer a"}
    request = asyncio.create_task(client.post(CHAT, chat_body(), **headers))
    await eventually(lambda: client.engine.stats.num_running > 0)

    status = await abort(client, "mine", Authorization="Bearer b")
    client.backend.gate.set()
    answered, answer = await asyncio.wait_for(request, PATIENCE_SECONDS)

    assert (status, answered, answer["choices"][0]["finish_reason"]) == (404, 200, "length")


async def test_a_client_that_leaves_behind_the_last_byte_of_its_body_is_aborted(
    client: Client, eventually: Eventually
) -> None:
    client.backend.gate = threading.Event()
    body = json.dumps(chat_body()).encode()
    fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n"
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)  # 100 Continue: the server reads the body

    writer.write(body)
    writer.close()
    await eventually(lambda: not client.server.num_connections)
    client.backend.gate.set()
    await client.engine.wait_idle()

    assert not client.engine.stats.finished["length"]


LEFT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", chat_body(n=3, stream=True)),
    ("/v1/chat/completions", chat_body(n=3, response_format={"type": "json_object"})),
    ("/v1/completions", completion_body(["a", "b", "c"] * 3, stream=True)),
    ("/v1/completions", completion_body(use_beam_search=True, best_of=6)),
    ("/v1/responses", {"input": "hi", "stream": True, "max_output_tokens": 6}),
    ("/v1/messages", {"messages": chat_body()["messages"], "stream": True, "max_tokens": 6}),
    ("/v1/embeddings", {"input": ["hi"] * 9}),
]


@pytest.mark.parametrize(("path", "body"), LEFT)
async def test_a_client_that_leaves_at_any_turn_of_the_loop_leaves_nothing(
    client: Client, eventually: Eventually, path: str, body: dict[str, Any]
) -> None:
    app, host, port = client.server._app, *client.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    stats, (model,) = client.engine.stats, app[MODELS]
    request = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"

    def held() -> list[int]:
        gauges = [stats.num_running, stats.num_waiting, stats.num_used_blocks]
        return [*gauges, len(app[RUNNING]), app[BODIES].num_bytes, model.num_requests]

    for num_turns in range(0, 60, 3):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request % (path.encode(), len(data), data))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        writer.transport.abort()
        await eventually(lambda: held() == [0] * 6)

        client.engine._engine.check_integrity()

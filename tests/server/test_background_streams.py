"""Background responses whose events are followed: left, taken up again, cancelled, and cut by a full store."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import aiohttp
import openai
import pytest

from brlite.app import create_app
from brlite.config.options import Config, KeysConfig, ModelSpec
from brlite.dialects.kept_events import KeptEvents
from brlite.dialects.responses_stored import FinishedResponse
from brlite.http.body import BODIES
from brlite.http.listen import HttpServer
from brlite.server.response_store import STORE
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "fake", "input": "hello", "max_output_tokens": 8, "temperature": 0}
STREAMED: dict[str, Any] = {**BODY, "background": True, "stream": True}


async def test_a_stream_is_left_and_taken_up_again(
    client: Client, api: openai.AsyncOpenAI, eventually: Eventually
) -> None:
    async with await api.responses.create(**STREAMED) as left:
        first = await anext(left)
    await eventually(lambda: not client.server.num_connections)
    follower = await api.responses.retrieve(first.response.id, stream=True, starting_after=first.sequence_number)
    second = await anext(follower)  # before the model has computed a token
    client.backend.gate.set()
    rest = [second, *[event async for event in follower]]
    again = [event async for event in await api.responses.retrieve(first.response.id, stream=True)]
    done = await api.responses.retrieve(first.response.id)

    assert (first.type, first.response.status, first.response.background) == ("response.created", "in_progress", True)
    assert second.type == "response.in_progress"
    assert [event.sequence_number for event in rest] == list(range(1, len(rest) + 1))
    assert again == [first, *rest]
    assert sum(event.type == "response.output_text.delta" for event in rest) == 8
    assert (rest[-1].type, rest[-1].response) == ("response.incomplete", done)
    assert sum(client.engine.stats.finished.values()) == client.engine.stats.finished["length"] == 1


async def test_openais_helper_takes_up_a_stream(client: Client, api: openai.AsyncOpenAI) -> None:
    client.backend.gate.set()
    begun = await anext(await api.responses.create(**STREAMED))

    async with api.responses.stream(response_id=begun.response.id) as stream:
        events = [event async for event in stream]

    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"


async def test_two_clients_follow_one_response_and_one_of_them_leaves(
    client: Client, api: openai.AsyncOpenAI, eventually: Eventually
) -> None:
    stream = await api.responses.create(**STREAMED)
    first = await anext(stream)
    stays, leaves = [await api.responses.retrieve(first.response.id, stream=True) for _ in range(2)]
    assert await anext(leaves) == first
    await leaves.close()
    await eventually(lambda: client.server.num_connections == 2)
    client.backend.gate.set()

    whole, followed = [first, *[event async for event in stream]], [event async for event in stays]

    assert followed == whole
    assert client.engine.stats.finished["abort"] == 0


async def test_a_cancel_ends_the_stream(client: Client, api: openai.AsyncOpenAI) -> None:
    stream = await api.responses.create(**STREAMED)
    first = await anext(stream)
    cancelling = asyncio.create_task(api.responses.cancel(first.response.id))
    client.backend.gate.set()

    *_, last = [event async for event in stream]
    cancelled = await cancelling

    assert (last.type, last.response.status, cancelled.status) == ("response.incomplete", "cancelled", "cancelled")
    assert last.response == cancelled
    assert client.engine.stats.finished["abort"] == 1
    assert client.engine.stats.num_used_blocks == 0


async def test_a_delete_ends_the_stream_and_nothing_is_kept(client: Client, api: openai.AsyncOpenAI) -> None:
    stream = await api.responses.create(**STREAMED)
    first = await anext(stream)
    await api.responses.delete(first.response.id)
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(first.response.id)
    client.backend.gate.set()

    *_, last = [event async for event in stream]

    assert last.type == "response.incomplete"
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(first.response.id)
    assert client.server._app[STORE].num_bytes == 0


async def test_a_server_that_stops_ends_the_stream_with_an_event(client: Client, api: openai.AsyncOpenAI) -> None:
    stream = await api.responses.create(**STREAMED)
    await anext(stream)

    closing = asyncio.create_task(client.server.close())
    events = [event async for event in stream]
    await asyncio.wait_for(closing, PATIENCE_SECONDS)
    client.backend.gate.set()
    await client.engine.wait_idle()

    assert events[-1].type == "response.failed"
    assert "stop" in events[-1].response.error.message
    assert client.engine.stats.num_used_blocks == 0


@pytest.mark.parametrize("after", [2, 100])
async def test_an_event_that_has_not_come_cannot_be_followed(
    client: Client, api: openai.AsyncOpenAI, after: int
) -> None:
    first = await anext(await api.responses.create(**STREAMED))

    with pytest.raises(openai.BadRequestError, match="numbered 0 to 1") as refusal:
        await api.responses.retrieve(first.response.id, stream=True, starting_after=after)

    assert refusal.value.param == "starting_after"


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_head_request_of_running_events_is_answered_at_once_without_a_body(
    client: Client, api: openai.AsyncOpenAI, is_streamed: bool
) -> None:
    if is_streamed:
        response = (await anext(await api.responses.create(**STREAMED))).response
    else:
        response = await api.responses.create(**{**STREAMED, "stream": False})
    host, port = client.url.removeprefix("http://").split(":")
    path = f"{PATH}/{response.id}"

    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"HEAD {path}?stream=true HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, rest = (await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)).partition(b"\r\n\r\n")
    writer.close()

    assert head.startswith(b"HTTP/1.1 200")
    assert b"text/event-stream" in head
    assert rest.startswith(b"HTTP/1.1 200")
    assert b'"status":"in_progress"' in rest


async def test_a_refusal_is_a_status_and_no_stream(client: Client, api: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        await api.responses.create(**{**STREAMED, "input": "x" * 1000})

    assert refusal.value.param == "input"


async def test_a_model_that_does_not_load_in_time_is_an_event_of_the_stream() -> None:
    spec = ModelSpec(name="fake", load="on_demand")
    config = Config(model=(spec,))
    app = create_app(ModelTable([ServedModel(spec)]), config)  # without a manager nothing ever loads it

    async with (
        HttpServer(app, "127.0.0.1", 0, config.limits) as server,
        aiohttp.ClientSession() as session,
        session.post(server.url + PATH, json={**STREAMED, "timeout": 0.05}) as response,
    ):
        text = await response.text()

    assert (response.status, response.content_type) == (200, "text/event-stream")
    assert text.startswith("event: error\ndata: {")
    assert app[STORE].num_bytes == 0


async def test_a_failed_step_fails_the_stream(make_client: MakeClient) -> None:
    client = await make_client(fault=lambda seq: "broken")

    *_, last = await read_events(client, "POST", PATH, json=STREAMED)

    assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "server_error")


async def test_a_retry_follows_the_stream_that_runs(client: Client, api: openai.AsyncOpenAI) -> None:
    key = {"extra_headers": {"Idempotency-Key": "k"}}
    stream = await api.responses.create(**STREAMED, **key)
    first = await anext(stream)
    retry = await api.responses.create(**STREAMED, **key)
    assert await anext(retry) == first
    client.backend.gate.set()

    rest, same = [event async for event in stream], [event async for event in retry]
    later = [event async for event in await api.responses.create(**STREAMED, **key)]

    assert rest == same == later[1:]
    assert sum(client.engine.stats.finished.values()) == 1


async def test_last_event_id_is_refused_with_the_right_way(client: Client) -> None:
    headers = {"Idempotency-Key": "k", "Last-Event-ID": "0"}

    status, answer = await client.post(PATH, STREAMED, **headers)

    assert (status, answer["error"]["param"]) == (400, "Last-Event-ID")
    assert "starting_after" in answer["error"]["message"]


async def test_another_key_cannot_follow_it(make_client: MakeClient) -> None:
    client = await make_client(config={"keys": KeysConfig(keys=("sk-1", "sk-2"))})
    client.backend.gate = threading.Event()
    mine, others = ({"Authorization": f"Bearer sk-{number}"} for number in (1, 2))
    async with client.session.post(client.url + PATH, json=STREAMED, headers=mine) as response:
        line = await response.content.readuntil(b"\n\n")
        response_id = json.loads(line.partition(b"data: ")[2])["response"]["id"]
        async with client.session.get(f"{client.url}{PATH}/{response_id}?stream=true", headers=others) as other:
            status = other.status
    client.backend.gate.set()

    assert status == 404


@pytest.mark.parametrize("body", [STREAMED, {**BODY, "background": True}])
async def test_a_running_response_that_a_full_store_forgets_is_found_all_the_same(
    make_client: MakeClient, body: dict[str, Any]
) -> None:
    client = await make_client(limits={"max_stored_bytes": 40_000})
    client.backend.gate = threading.Event()
    running = await begin(client, body)
    store = client.server._app[STORE]
    store.put("", "other", FinishedResponse("other", b"", (), {}), 39_999)  # as a response that ends meanwhile

    read = await client.get(f"{PATH}/{running}")
    items = await client.get(f"{PATH}/{running}/input_items")
    continued = await client.post(PATH, {**BODY, "previous_response_id": running})
    cancelling = asyncio.create_task(client.post(f"{PATH}/{running}/cancel", {}))
    client.backend.gate.set()
    status, cancelled = await cancelling

    assert store.get("", running) is not None  # stored when it ended
    assert (read[0], read[1]["status"], items[0]) == (200, "in_progress", 200)
    assert (continued[0], continued[1]["error"]["code"]) == (400, "response_in_progress")
    assert (status, cancelled["status"]) == (200, "cancelled")


async def test_events_for_which_the_store_has_no_room_are_dropped_aloud(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client(limits={"max_stored_bytes": 40_000})
    client.backend.gate = threading.Event()
    running = await begin(client, STREAMED)
    client.server._app[STORE].put("", "other", FinishedResponse("other", b"", (), {}), 39_999)
    client.backend.gate.set()
    await client.engine.wait_idle()

    _, done = await client.get(f"{PATH}/{running}")
    status, refusal = await client.get(f"{PATH}/{running}?stream=true")

    assert done["status"] == "incomplete"
    assert any("max_stored_bytes" in warning for warning in done["warnings"])
    assert (status, refusal["error"]["code"]) == (400, "stream_not_resumable")
    assert "the store of responses is full (limits.max_stored_bytes = 40000)" in caplog.text


async def test_kept_events_and_the_body_count_while_the_response_runs(client: Client, eventually: Eventually) -> None:
    client.backend.gate = threading.Event()
    store, bodies = client.server._app[STORE], client.server._app[BODIES]
    await begin(client, STREAMED)
    begun, held = store.num_bytes, bodies.num_bytes
    client.backend.gate.set()
    await client.engine.wait_idle()
    await eventually(lambda: bodies.num_bytes == 0)

    assert 16_384 < begun < 20_000
    assert held > 60


@pytest.mark.parametrize("name", ["background", "\\u0062ackground", "backgro\\u0075nd"])
async def test_each_spelling_of_the_field_runs_in_the_background(client: Client, name: str) -> None:
    status, answer = await client.post(PATH, f'{{"input": "hi", "{name}": true}}'.encode())

    assert (status, answer["status"], answer["background"]) == (200, "in_progress", True)


async def begin(client: Client, body: dict[str, Any]) -> str:
    """Begin a background response and leave. Returns its id."""
    async with client.session.post(client.url + PATH, json=body) as response:
        data = await response.content.readuntil(b"\n\n") if body.get("stream") else await response.read()
    answer = json.loads(data.partition(b"data: ")[2] or data)
    return str(answer.get("response", answer)["id"])


async def read_events(client: Client, method: str, path: str, **options: Any) -> list[dict[str, Any]]:
    async with client.session.request(method, client.url + path, **options) as response:
        lines = [line async for line in response.content]
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]


async def test_a_client_that_does_not_read_has_few_events_of_a_stored_response_in_memory(
    client: Client, eventually: Eventually
) -> None:
    kept = KeptEvents()
    kept.add(b"data: %b\n\n" % (b"x" * 8000) * 4000)
    kept.finish()
    client.server._app[STORE].put("", "resp_1", FinishedResponse("resp_1", b"", (), {}, kept), 1)
    _, writer = await asyncio.open_connection("127.0.0.1", client.server.port, limit=1024)

    writer.write(b"GET /v1/responses/resp_1?stream=true HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: client.unsent_bytes > 0)

    assert client.unsent_bytes < 10**6
    writer.transport.abort()

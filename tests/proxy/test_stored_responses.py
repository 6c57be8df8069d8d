"""Responses that upstreams store: what is asked about one goes to the upstream that has it, for the key that made it.

The upstreams are brlite servers of the toy, which says again what it was told.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import aiohttp
import msgspec
import openai
import pytest

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine
from tests.proxy.conftest import Connect
from tests.proxy.proxies import wait_until
from tests.proxy.raw_client import Client
from tests.proxy.scripted import Act, Call, ScriptedUpstream, Then
from tests.proxy.stored import behind, json_answer


async def toy(stack: AsyncExitStack) -> str:
    """The address of a server of the toy."""
    config = Config(model=(ModelSpec(name="toy", path=None, build_seq=4096),), engine=EngineConfig(name="toy"))
    engine = await stack.enter_async_context(AsyncEngine.from_config(config))
    server = HttpServer(create_app(engine, config), "127.0.0.1", 0, config.limits, grace_seconds=0.2)
    await stack.enter_async_context(server)
    return server.url


async def test_what_is_asked_about_a_response_goes_to_the_upstream_that_stores_it(
    stack: AsyncExitStack, connect: Connect
) -> None:
    setting = await behind(stack, connect, await toy(stack), await toy(stack))
    responses = setting.clients[0].responses
    made = [await responses.create(model="toy", input=f"number {index}") for index in range(4)]

    second = [await responses.create(model="toy", input="and?", previous_response_id=each.id) for each in made]
    items = [(await responses.input_items.list(each.id)).data[-1].model_dump() for each in second]
    again = [await responses.retrieve(each.id) for each in made]
    stream = await responses.retrieve(made[1].id, stream=True, starting_after=0)
    events = [event async for event in stream]
    for each in made:
        await responses.delete(each.id)

    assert min(setting.num_answered) > 0
    assert [item["content"][0]["text"] for item in items] == [f"number {index}" for index in range(4)]
    assert again == made
    assert events[-1].response == made[1]  # type: ignore[union-attr]  # it is response.completed
    assert events[0].sequence_number == 1
    for each in made:
        with pytest.raises(openai.NotFoundError):
            await responses.retrieve(each.id)


@pytest.mark.parametrize("query", ["", "?stream=true", "/input_items"])
async def test_a_head_of_a_stored_response_has_the_headers_of_its_get_and_no_body(
    stack: AsyncExitStack, connect: Connect, query: str
) -> None:
    setting = await behind(stack, connect, await toy(stack))
    made = await setting.clients[0].responses.create(model="toy", input="hello", background=True, stream=True)
    events = [event async for event in made]
    path = f"/v1/responses/{events[0].response.id}{query}"  # type: ignore[union-attr]  # it is response.created
    lines = (b"Host: proxy", b"Authorization: Bearer secret-a", b"Connection: close")
    request = b"\r\n".join((b"HEAD %b HTTP/1.1" % path.encode(), *lines)) + b"\r\n\r\n"
    client = await Client.connect(setting.proxy.port)

    client.send(request)
    head = await client.reader.read()
    client.leave()

    async with (
        aiohttp.ClientSession(setting.url) as session,
        session.get(path, headers={"Authorization": "Bearer secret-a"}) as got,
        session.head(path, headers={"Authorization": "Bearer secret-b"}) as others,
    ):
        pass
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nContent-Type: %b\r\n" % got.headers["Content-Type"].encode() in head
    assert head.find(b"\r\n\r\n") == len(head) - 4
    assert others.status == 404


@pytest.mark.parametrize("lines", [(), (b"Content-Length: 0",), (b"Content-Length: 0", b"Content-Type: text/plain")])
async def test_a_response_is_cancelled_by_a_request_without_a_body(
    stack: AsyncExitStack, connect: Connect, lines: tuple[bytes, ...]
) -> None:
    setting = await behind(stack, connect, await toy(stack))
    made = await setting.clients[0].responses.create(model="toy", input="hello", background=True)
    first = b"POST /v1/responses/%b/cancel HTTP/1.1" % made.id.encode()
    client = await Client.connect(setting.proxy.port)

    client.send(b"\r\n".join((first, b"Host: proxy", b"Authorization: Bearer secret-a", *lines)) + b"\r\n\r\n")
    answer = await client.answer()
    client.leave()

    assert answer.status == 200, answer.body
    assert made.id.encode() in answer.body


async def test_a_background_stream_is_left_and_taken_up_again_at_its_upstream(
    stack: AsyncExitStack, connect: Connect
) -> None:
    setting = await behind(stack, connect, await toy(stack), await toy(stack))
    mine, others = (client.responses for client in setting.clients)
    text = " ".join(map(str, range(200)))

    async with await mine.create(model="toy", input=text, background=True, stream=True) as left:
        first = await anext(left)
    rest = [event async for event in await mine.retrieve(first.response.id, stream=True, starting_after=0)]  # type: ignore[union-attr]  # it is response.created

    assert [event.sequence_number for event in rest] == list(range(1, len(rest) + 1))
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.output_text == text
    with pytest.raises(openai.NotFoundError):
        await others.retrieve(rest[-1].response.id, stream=True)


async def test_a_client_that_has_all_events_of_a_stored_stream_gets_none_and_no_error(
    stack: AsyncExitStack, connect: Connect
) -> None:
    setting = await behind(stack, connect, await toy(stack))
    mine = setting.clients[0].responses
    made = [event async for event in await mine.create(model="toy", input="hello", background=True, stream=True)]
    last = made[-1]

    stream = await mine.retrieve(last.response.id, stream=True, starting_after=last.sequence_number)  # type: ignore[union-attr]  # it is response.completed

    assert [event async for event in stream] == []
    assert setting.proxy.forwarder.table.upstreams[0].counts.outcomes["failed"] == 0


@pytest.mark.parametrize("num_left", [0, 1, 2])
async def test_the_end_of_a_stream_is_resumed_at_its_upstream(
    stack: AsyncExitStack, connect: Connect, num_left: int
) -> None:
    setting = await behind(stack, connect, await toy(stack), keys=())
    body = {"model": "toy", "stream": True, "messages": [{"role": "user", "content": "hello"}]}

    async def ask(num_seen: int) -> list[bytes]:
        headers = {"Idempotency-Key": "k", "Last-Event-ID": str(num_seen)}
        async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
            return (await response.read()).split(b"\n\n")[:-1]

    async with aiohttp.ClientSession(setting.url) as session:
        events = await ask(0)
        rest = await ask(len(events) - num_left)

    assert rest == events[len(events) - num_left :]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_one_key_does_not_reach_the_responses_of_another(
    stack: AsyncExitStack, connect: Connect, is_streamed: bool
) -> None:
    setting = await behind(stack, connect, await toy(stack))
    mine, others = (client.responses for client in setting.clients)
    if is_streamed:
        events = [event async for event in await mine.create(model="toy", input="secret", stream=True)]
        name = events[-1].response.id  # type: ignore[union-attr]  # it is response.completed
    else:
        name = (await mine.create(model="toy", input="secret")).id

    with pytest.raises(openai.NotFoundError):
        await others.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        await others.delete(name)
    with pytest.raises(openai.NotFoundError):
        await others.cancel(name)
    with pytest.raises(openai.BadRequestError) as refused:
        await others.create(model="toy", input="what was it?", previous_response_id=name)
    with pytest.raises(openai.BadRequestError):
        await others.input_tokens.count(model="toy", previous_response_id=name)

    assert (refused.value.param, refused.value.code) == ("previous_response_id", "previous_response_not_found")
    assert (await mine.retrieve(name)).id == name


@pytest.mark.parametrize(
    "fields",
    [
        b'"previous_response_id":"x","previous_response_id":"MINE"',
        b'"previous_response_id":"MINE","previous_response_id":null',
        b'"previous\\u005fresponse_id":"MINE"',
        b'"previous_response_id":7',
        b'"Previous_Response_ID":"MINE"',
        '"previou\u017f_response_id":"MINE"'.encode(),  # Go reads a long s as an s
        b'"previous_response_id":null,"previous_response_i\\u0044":"MINE"',
    ],
)
async def test_a_field_that_is_spelt_or_repeated_oddly_does_not_reach_another_keys_response(
    stack: AsyncExitStack, connect: Connect, fields: bytes
) -> None:
    setting = await behind(stack, connect, await toy(stack))
    name = (await setting.clients[0].responses.create(model="toy", input="secret")).id
    body = b'{"model":"toy","input":"what was it?",%b}' % fields.replace(b"MINE", name.encode())
    headers = {"Authorization": "Bearer secret-b", "Content-Type": "application/json"}

    session = aiohttp.ClientSession(headers=headers)
    async with session, session.post(f"{setting.url}/v1/responses", data=body) as response:
        refusal = await response.json()

    assert response.status == 400
    assert refusal["error"]["param"] == "previous_response_id"


async def test_the_oldest_ids_are_forgotten_and_without_keys_the_upstream_is_asked_all_the_same(
    stack: AsyncExitStack, connect: Connect
) -> None:
    setting = await behind(stack, connect, await toy(stack), keys=(), max_owner_bytes=400)
    responses = setting.clients[0].responses
    made = [await responses.create(model="toy", input=text) for text in ("one", "two")]

    third = await responses.create(model="toy", input="and?", previous_response_id=made[0].id)
    with pytest.raises(openai.NotFoundError):
        await responses.retrieve(made[0].id)
    async with aiohttp.ClientSession() as session, session.get(f"{setting.url}/metrics") as response:
        metrics = await response.text()

    assert third.previous_response_id == made[0].id
    assert "brlite:proxy_response_ids 1.0\n" in metrics
    assert "brlite:proxy_response_ids_forgotten_total 2.0\n" in metrics


async def test_a_response_whose_upstream_is_gone_is_not_looked_for_at_another(
    stack: AsyncExitStack, connect: Connect
) -> None:
    gone = AsyncExitStack()
    setting = await behind(stack, connect, await toy(gone), await toy(stack))
    responses = setting.clients[0].responses
    made = [await responses.create(model="toy", input="hello") for _ in range(2)]
    await gone.aclose()

    with pytest.raises(openai.InternalServerError) as first:
        await responses.retrieve(made[0].id)
    with pytest.raises(openai.InternalServerError):
        await responses.create(model="toy", input="and?", previous_response_id=made[0].id)

    assert first.value.status_code in (502, 503)
    assert (await responses.retrieve(made[1].id)).id == made[1].id


@pytest.mark.parametrize(
    ("path", "fields", "shown"),
    [
        ("/v1/responses/input_tokens", {"input": "hello"}, "input_tokens"),
        ("/responses/input_tokens/", {"input": "hello"}, "input_tokens"),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "hello"}]}, "token_ids"),
        ("/v1/completions/render", {"prompt": "hello"}, "token_ids"),
        ("/explain", {"prompt": "hello"}, "token_ids"),
        ("/apply-template", {"messages": [{"role": "user", "content": "hello"}]}, "prompt"),
    ],
)
async def test_what_computes_nothing_is_forwarded_and_costs_a_key_no_tokens(
    stack: AsyncExitStack, connect: Connect, path: str, fields: dict[str, object], shown: str
) -> None:
    setting = await behind(stack, connect, await toy(stack))

    session = aiohttp.ClientSession(headers={"Authorization": "Bearer secret-a"})
    async with session, session.post(f"{setting.url}{path}", json={"model": "toy", **fields}) as response:
        text = await response.text()

    assert response.status == 200, text
    assert shown in text
    assert setting.num_answered == [1]
    assert setting.proxy.keys.find("secret-a").usage.prompt_tokens == 0  # type: ignore[union-attr]


async def test_an_infill_goes_to_the_server_of_its_model(stack: AsyncExitStack, connect: Connect) -> None:
    setting = await behind(stack, connect, await toy(stack))
    body = {"model": "toy", "input_prefix": "hello ", "input_suffix": "", "n_predict": 4}

    session = aiohttp.ClientSession(headers={"Authorization": "Bearer secret-a"})
    async with session, session.post(f"{setting.url}/infill", json=body) as response:
        answer = await response.json()

    assert answer["error"]["param"] == "input_suffix"  # the toy's own words: its vocabulary has no tokens for gaps
    assert setting.num_answered == [1]


async def test_of_two_responses_with_one_id_the_later_is_meant(
    stack: AsyncExitStack, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def acting(text: str) -> Act:
        async def act(call: Call) -> Then:
            await call.send(json_answer({"id": "resp_1", "output": text}))
            return "keep"

        return act

    upstreams = [await stack.enter_async_context(ScriptedUpstream(act=acting(text))) for text in ("first", "second")]
    setting = await behind(stack, connect, *(upstream.url for upstream in upstreams))
    responses = setting.clients[0].responses

    made = [await responses.create(model="toy", input="hello") for _ in range(2)]
    found = await responses.retrieve("resp_1")

    assert [each.output for each in (*made, found)] == ["first", "second", "second"]
    assert "upstreams u0 and u1 made responses with the same id, resp_1" in caplog.text


async def test_a_stream_may_be_looked_at_while_it_runs(stack: AsyncExitStack, connect: Connect) -> None:
    may_end = asyncio.Event()
    response = {"id": "resp_1", "object": "response", "output": [], "usage": None}

    async def act(call: Call) -> Then:
        if call.request.method == b"GET":
            await call.send(json_answer({**response, "status": "in_progress"}))
            return "keep"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        created = {"type": "response.created", "response": response}
        await call.send(b"%bdata: %b\n\n" % (head, msgspec.json.encode(created)))
        await may_end.wait()
        await call.send(b'data: {"type": "response.completed", "response": {"id": "resp_1", "usage": {}}}\n\n')
        return "close"

    upstream = await stack.enter_async_context(ScriptedUpstream(act=act))
    setting = await behind(stack, connect, upstream.url)
    client, other = setting.clients

    stream = await client.responses.create(model="toy", input="hello", stream=True)
    await anext(stream)
    found = await client.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError):
        await other.responses.retrieve("resp_1")
    may_end.set()
    rest = [event.type async for event in stream]

    assert found.status == "in_progress"
    assert rest == ["response.completed"]
    await wait_until(lambda: setting.proxy.forwarder.num_active == 0)


async def test_a_response_that_is_not_stored_is_not_remembered(stack: AsyncExitStack, connect: Connect) -> None:
    setting = await behind(stack, connect, await toy(stack))

    await setting.clients[0].responses.create(model="toy", input="hello", store=False)

    assert len(setting.proxy.forwarder.owners.store) == 0

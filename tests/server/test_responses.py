"""The Responses API with the official client: the toy says again what it was told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest
from msgspec import Raw
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, KeysConfig, LimitsConfig, ModelSpec
from brlite.dialects.responses_encoder import FinishedResponse
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine
from brlite.server.response_store import ResponseStore
from tests.limits import PATIENCE_SECONDS

TOOLS: list[Any] = [{"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

Start = Callable[..., Awaitable[list[openai.AsyncOpenAI]]]


@pytest.fixture
async def serve() -> AsyncIterator[Start]:
    """`await serve(keys=…, max_stored_bytes=…)` serves the toy, and returns a client for each key."""
    async with AsyncExitStack() as stack:

        async def start(keys: tuple[str, ...] = (), **limits: Any) -> list[openai.AsyncOpenAI]:
            spec = ModelSpec(name="toy", path=None, build_seq=4096)
            config = Config(
                model=(spec,),
                engine=EngineConfig(name="toy"),
                limits=LimitsConfig(**limits),
                keys=KeysConfig(keys=keys),
            )
            engine = await stack.enter_async_context(AsyncEngine.from_config(config))
            server = HttpServer(create_app(engine, config), "127.0.0.1", 0, config.limits, grace_seconds=0.2)
            await stack.enter_async_context(server)
            url = f"http://127.0.0.1:{server.port}/v1"
            clients = [
                openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE_SECONDS)
                for key in keys or ("none",)
            ]
            return [await stack.enter_async_context(client) for client in clients]

        yield start


async def test_two_turns_with_a_tool_and_a_stored_response(serve: Start) -> None:
    (client,) = await serve()

    first = await client.responses.create(model="toy", input=f"I look.\n{CALL}", tools=TOOLS, instructions="Be brief.")
    call: Any = first.output[1]
    output: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "noon"},
        {"role": "user", "content": "So?"},
    ]
    second = await client.responses.create(model="toy", input=output, tools=TOOLS, previous_response_id=first.id)

    assert [item.type for item in first.output] == ["message", "function_call"]
    assert second.output_text == "<tool_response>\nnoon\n</tool_response>\nSo?"
    assert await client.responses.retrieve(first.id) == first
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)


async def test_a_stream_has_all_events_in_order_as_the_clients_types_say(serve: Start) -> None:
    (client,) = await serve()
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

    async with client.responses.stream(model="toy", input=f"I look.\n{CALL}", tools=TOOLS) as stream:
        final = await stream.get_final_response()
    async with client.responses.with_streaming_response.create(
        model="toy", input=f"I look.\n{CALL}", tools=TOOLS, stream=True
    ) as response:
        lines = [line async for line in response.iter_lines()]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events if not event["type"].endswith("delta")] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        *("response.output_item.added", "response.function_call_arguments.done", "response.output_item.done"),
        "response.completed",
    ]
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [
        event["type"] for event in events
    ]
    for event in events:  # every required field is there, and no field that the type lacks
        assert not adapter.validate_python(event).model_extra
    assert Response.model_validate(events[-1]["response"]).model_extra == {"store": True}  # OpenAI says it, too
    assert [item.type for item in final.output] == ["message", "function_call"]


async def test_a_key_never_reads_what_another_one_has_stored(serve: Start) -> None:
    mine, other = await serve(keys=("a", "b"))

    stored = await mine.responses.create(model="toy", input="secret")

    with pytest.raises(openai.NotFoundError):
        await other.responses.retrieve(stored.id)
    with pytest.raises(openai.BadRequestError) as refusal:
        await other.responses.create(model="toy", input="and?", previous_response_id=stored.id)
    assert (refusal.value.param, refusal.value.code) == ("previous_response_id", "previous_response_not_found")


async def test_without_a_store_nothing_is_kept(serve: Start) -> None:
    (client,) = await serve(max_stored_bytes=0)

    response = await client.responses.create(model="toy", input="hello", store=True)

    assert response.model_extra is not None
    assert "not stored" in response.model_extra["warnings"][0]
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"type": "frob"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, "input[0].call_id"),
        ({"input": []}, "input"),
        ({"input": "x", "tools": [{"type": "mcp"}]}, "tools[0].type"),
        ({"input": "x", "include": ["frob"]}, "include[0]"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "text": {"format": {"type": "frob"}}}, "text.format.type"),
        ({"input": "x", "temperature": -1}, "temperature"),
    ],
)
async def test_a_bad_field_is_refused_by_its_name(serve: Start, fields: dict[str, Any], param: str) -> None:
    (client,) = await serve()

    with pytest.raises(openai.BadRequestError) as refusal:
        await client.responses.create(model="toy", **fields)

    assert refusal.value.param == param


def test_a_full_store_forgets_the_oldest_of_the_tenant_that_holds_most() -> None:
    store = ResponseStore(5000)
    mine, other = store.of("a"), store.of("b")
    other.keep(FinishedResponse("resp_0", b"x" * 500, (), {}))

    for number in range(1, 6):
        mine.keep(FinishedResponse(f"resp_{number}", b"x" * 1000, (Raw(b"{}"),), {}))

    assert store.num_bytes <= 5000
    assert (mine.get("resp_1"), other.get("resp_0") is not None) == (None, True)
    assert store.num_forgotten > 0

"""The Responses API with the official client: the toy says again what it was told."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from msgspec import Raw
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from brlite.app import create_app
from brlite.config.options import DEFAULT_MODEL, Config, EngineConfig, KeysConfig, LimitsConfig, ModelSpec
from brlite.dialects.responses_stored import FinishedResponse
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine
from brlite.server.response_store import TenantResponses, make_response_store
from tests.api_clients import openai_client
from tests.limits import PATIENCE_SECONDS

TOOLS: list[Any] = [{"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

Start = Callable[..., Awaitable[list[openai.AsyncOpenAI]]]


@pytest.fixture
async def serve() -> AsyncIterator[Start]:
    """`await serve(keys=…, options=…, name=…, reasoning_parser=…, LIMIT=…)` serves the toy; a client for each key."""
    async with AsyncExitStack() as stack:

        async def start(
            keys: tuple[str, ...] = (),
            options: dict[str, Any] | None = None,
            name: str = "toy",
            reasoning_parser: str = "auto",
            **limits: Any,
        ) -> list[openai.AsyncOpenAI]:
            spec = ModelSpec(name=name, path=None, build_seq=4096, reasoning_parser=reasoning_parser)
            config = Config(
                model=(spec,),
                engine=EngineConfig(name="toy", options=options or {}),
                limits=LimitsConfig(**limits),
                keys=KeysConfig(keys=keys),
            )
            engine = await stack.enter_async_context(AsyncEngine.from_config(config))
            server = HttpServer(create_app(engine, config), "127.0.0.1", 0, config.limits, grace_seconds=0.2)
            await stack.enter_async_context(server)
            clients = [openai_client(server.url, key) for key in keys or ("none",)]
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
        ({"input": "x", "background": True, "store": False}, "background"),
        ({"input": "x", "text": {"format": {"type": "frob"}}}, "text.format.type"),
        ({"input": "x", "text": {"format": {"type": "json_object", "schema": {}}}}, "text.format.schema"),
        ({"input": "x", "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"input": "x", "temperature": -1}, "temperature"),
    ],
)
async def test_a_bad_field_is_refused_by_its_name(serve: Start, fields: dict[str, Any], param: str) -> None:
    (client,) = await serve()

    with pytest.raises(openai.BadRequestError) as refusal:
        await client.responses.create(model="toy", **fields)

    assert refusal.value.param == param


async def test_a_stored_response_is_sent_again_as_the_stream_that_it_was(serve: Start) -> None:
    (client,) = await serve()
    stream = await client.responses.create(model="toy", input=f"I look.\n{CALL}", tools=TOOLS, stream=True)
    events: list[Any] = [event async for event in stream]
    name = events[-1].response.id

    again = [event async for event in await client.responses.retrieve(name, stream=True)]
    rest = [event async for event in await client.responses.retrieve(name, stream=True, starting_after=5)]

    assert again == events
    assert rest == events[6:]


async def test_a_stored_response_that_was_no_stream_is_sent_as_one(serve: Start) -> None:
    (client,) = await serve()
    response = await client.responses.create(model="toy", input=f"I look.\n{CALL}", tools=TOOLS)

    again: list[Any] = [event async for event in await client.responses.retrieve(response.id, stream=True)]

    assert [event.sequence_number for event in again] == list(range(len(again)))
    assert [again[0].type, again[-1].type] == ["response.created", "response.completed"]
    assert again[-1].response == response


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"stream": "maybe"}, "stream"),
        ({"starting_after": "1"}, "starting_after"),
        ({"stream": "true", "starting_after": "-1"}, "starting_after"),
        ({"stream": "true", "starting_after": "9" * 5000}, "starting_after"),
        ({"stream": "true", "starting_after": "99999"}, "starting_after"),
    ],
)
async def test_a_bad_query_of_a_stored_response_is_refused(serve: Start, query: dict[str, Any], param: str) -> None:
    (client,) = await serve()
    response = await client.responses.create(model="toy", input="hello")

    with pytest.raises(openai.BadRequestError) as refusal:
        await client.responses.retrieve(response.id, extra_query=query)

    assert refusal.value.param == param


def test_a_full_store_forgets_the_oldest_of_the_tenant_that_holds_most(caplog: pytest.LogCaptureFixture) -> None:
    store = make_response_store(5000)
    mine, other = TenantResponses(store, "a", {}), TenantResponses(store, "b", {})
    other.keep(FinishedResponse("resp_0", b"x" * 500, (), {}))

    for number in range(1, 6):
        mine.keep(FinishedResponse(f"resp_{number}", b"x" * 1000, (Raw(b"{}"),), {}))

    assert store.num_bytes <= 5000
    assert (mine.get("resp_1"), other.get("resp_0") is not None) == (None, True)
    assert store.num_forgotten > 0
    assert "limits.max_stored_bytes = 5000" in caplog.text


class Verdict(pydantic.BaseModel):
    ok: bool
    colour: Literal["red", "green"]


async def test_parse_reads_structured_output_into_the_clients_own_model(serve: Start) -> None:
    (client,) = await serve()

    parsed = await client.responses.parse(model="toy", input="hello", text_format=Verdict)
    async with client.responses.stream(model="toy", input="hello", text_format=Verdict) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()

    assert isinstance(parsed.output_parsed, Verdict)
    assert isinstance(final.output_parsed, Verdict)
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


async def test_the_arguments_of_a_strict_tool_are_parsed_by_the_client(serve: Start) -> None:
    (client,) = await serve()
    tool = openai.pydantic_function_tool(Verdict, name="judge")["function"]
    tools: list[Any] = [{"type": "function", **tool}]
    text = '<tool_call>\n{"name": "judge", "arguments": {"ok":true,"colour":"red"}}\n</tool_call>'

    parsed = await client.responses.parse(model="toy", input=text, tools=tools)

    (call,) = parsed.output
    assert call.type == "function_call"
    assert call.parsed_arguments == {"ok": True, "colour": "red"}


async def test_a_cut_response_is_incomplete_and_says_why(serve: Start) -> None:
    (client,) = await serve()

    response = await client.responses.create(model="toy", input="hello there", max_output_tokens=16)
    cut = await client.responses.create(model="toy", input="x" * 64, max_output_tokens=16)

    assert (response.status, response.incomplete_details) == ("completed", None)
    assert cut.incomplete_details is not None
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


async def test_a_step_that_fails_ends_the_stream_with_response_failed(serve: Start) -> None:
    (client,) = await serve(options={"fail_every": 4})

    events = [event async for event in await client.responses.create(model="toy", input="hello", stream=True)]

    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.code == "server_error"
    assert (await client.responses.retrieve(events[-1].response.id)).status == "failed"


async def test_reasoning_is_an_item_of_its_own_whose_tokens_are_counted(serve: Start) -> None:
    (client,) = await serve(reasoning_parser="think")
    text = "<think>\nI must look.\n</think>\n\nYes."

    response = await client.responses.create(model="toy", input=text, include=["reasoning.encrypted_content"])

    reasoning, message = response.output
    assert (reasoning.type, message.type) == ("reasoning", "message")
    assert reasoning.content is not None
    assert reasoning.content[0].text == "I must look."
    assert reasoning.encrypted_content
    assert response.output_text == "Yes."
    assert response.usage is not None
    details = response.usage.output_tokens_details
    assert 0 < details.reasoning_tokens < response.usage.output_tokens
    async with client.responses.stream(model="toy", input=text) as stream:
        final = await stream.get_final_response()
    assert final.usage is not None
    assert final.usage.output_tokens_details == details


async def test_items_are_listed_and_named_by_their_ids(serve: Start) -> None:
    (client,) = await serve()
    first = await client.responses.create(model="toy", input="hello", instructions="Be brief.")

    reference: Any = [{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "again"}]
    second = await client.responses.create(model="toy", input=reference, instructions=None)
    items = await client.responses.input_items.list(second.id, order="asc")

    assert [item.type for item in items.data] == ["message", "message"]
    assert second.output_text == "again"
    assert second.instructions is None


@pytest.mark.parametrize("limit", ["0", "101", "-1", "", "x", "1" * 20, "000000001" + "9" * 5000])
async def test_a_number_of_items_that_is_out_of_range_is_refused(serve: Start, limit: str) -> None:
    (client,) = await serve()
    response = await client.responses.create(model="toy", input="hi")

    with pytest.raises(openai.BadRequestError) as refusal:
        await client.responses.input_items.list(response.id, extra_query={"limit": limit})

    assert refusal.value.param == "limit"


async def test_only_background_responses_can_be_cancelled(serve: Start) -> None:
    (client,) = await serve()
    response = await client.responses.create(model="toy", input="hello")

    with pytest.raises(openai.BadRequestError, match="background"):
        await client.responses.cancel(response.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.cancel("resp_none")


async def test_what_a_full_store_forgets_is_in_the_metrics(serve: Start) -> None:
    (client,) = await serve(max_stored_bytes=6000)

    responses = [await client.responses.create(model="toy", input="hello") for _ in range(8)]
    text = await client.with_options(base_url=str(client.base_url).removesuffix("v1/")).get("/metrics", cast_to=str)

    numbers = {
        name: float(number)
        for name, number in re.findall(r"^(brlite:\w*stored\w*|brlite:responses\w*) (\S+)$", text, re.M)
    }
    assert numbers["brlite:responses_forgotten_total"] == 8 - numbers["brlite:stored_responses"] > 0
    assert 0 < numbers["brlite:stored_response_bytes"] <= 6000
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(responses[0].id)
    assert (await client.responses.retrieve(responses[-1].id)).id == responses[-1].id


async def test_a_chat_of_a_real_tokenizer_is_shown_as_its_text(serve: Start) -> None:
    (client,) = await serve()
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": {"name": "f"}}]}

    applied = await client.post("/apply-template", body=body, cast_to=dict)
    rendered = await client.post("/chat/completions/render", body=body, cast_to=dict)
    explained = await client.post("/explain", body=body, cast_to=dict)

    assert "hi" in applied["prompt"]
    assert applied["prompt"] == rendered["prompt"] == explained["prompts"][0]["text"]
    assert rendered["token_ids"] == explained["prompts"][0]["token_ids"]


async def test_an_agent_calls_its_tool_in_two_turns(serve: Start) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    (client,) = await serve()

    @agents.function_tool  # type: ignore[untyped-decorator]
    def now() -> str:
        """The time."""
        return "noon"

    agents.set_tracing_disabled(True)
    model = agents.OpenAIResponsesModel(model="toy", openai_client=client)
    agent = agents.Agent(name="clock", instructions="Tell the time.", model=model, tools=[now])
    result = await agents.Runner.run(agent, f"I look.\n{CALL}", max_turns=3)

    assert [item.type for item in result.new_items] == [
        *("message_output_item", "tool_call_item", "tool_call_output_item", "message_output_item"),
    ]
    assert "noon" in result.final_output


async def test_the_example_of_the_page_runs(serve: Start) -> None:
    (client,) = await serve(name=DEFAULT_MODEL)
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page.split("\n## Responses\n")[1].split("\n## ")[0], re.DOTALL)
    code = example.replace("http://127.0.0.1:8000/v1", str(client.base_url))

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)

    assert process.returncode == 0
    assert printed.startswith(b"Name a river.\nName a second one.ResponseUsage(")

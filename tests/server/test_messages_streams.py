"""The streams of Anthropic's Messages: their bytes, and what the client's types say of them."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import pydantic
import pytest
from aiohttp import web
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.beta import BetaMessage, BetaRawMessageStreamEvent

from brlite.server.generate import end_all
from tests.server.conftest import ServeToy
from tests.server.messages import CALL, CALL_NOW, NOW, THOUGHT, TOOLS, ask, events_of, says, wire

STREAM: Any = pydantic.TypeAdapter(RawMessageStreamEvent)
BETA_STREAM: Any = pydantic.TypeAdapter(BetaRawMessageStreamEvent)

PLAIN_STREAM = """\
event: message_start
data: {"type":"message_start","message":{"type":"message","id":"msg_1","role":"assistant","model":"toy","content":[],\
"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":4,"output_tokens":0,"cache_creation_input_tokens":0,\
"cache_read_input_tokens":0}}}

event: ping
data: {"type":"ping"}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"h"}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"i"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"input_tokens":4,\
"output_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":0}}

event: message_stop
data: {"type":"message_stop"}

"""
TOOL_STREAM = """\
event: message_start
data: {"type":"message_start","message":{"type":"message","id":"msg_1","role":"assistant","model":"toy","content":[],\
"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":INPUT,"output_tokens":0,\
"cache_creation_input_tokens":0,"cache_read_input_tokens":0}}}

event: ping
data: {"type":"ping"}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"M"}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"brlite"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: content_block_start
data: {"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"A"}}

event: content_block_stop
data: {"type":"content_block_stop","index":1}

event: content_block_start
data: {"type":"content_block_start","index":2,"content_block":{"type":"tool_use","id":"toolu_1","name":"now",\
"input":{}}}

event: content_block_delta
data: {"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"{"}}

event: content_block_delta
data: {"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"}"}}

event: content_block_stop
data: {"type":"content_block_stop","index":2}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},"usage":{"input_tokens":INPUT,\
"output_tokens":OUTPUT,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,\
"output_tokens_details":{"thinking_tokens":THINKING}}}

event: message_stop
data: {"type":"message_stop"}

"""


def extras_of(value: Any) -> list[str]:
    """The fields of a model, and of all models in it, that its type does not have."""
    if isinstance(value, list):
        return [name for each in value for name in extras_of(each)]
    if not isinstance(value, pydantic.BaseModel):
        return []
    names = list(value.model_extra or ())
    return names + [name for field in type(value).model_fields for name in extras_of(getattr(value, field))]


async def test_the_golden_text_of_a_plain_stream(serve_toy: ServeToy) -> None:
    client = await serve_toy()

    text = await wire(client, "hi", stream=True)

    assert re.sub(r"msg_\w+", "msg_1", text) == PLAIN_STREAM


async def test_the_golden_text_of_a_stream_with_thinking_and_a_tool(serve_toy: ServeToy) -> None:
    client = await serve_toy()

    said = f"<think>M</think>A{CALL_NOW}"
    text = await wire(client, said, stream=True, tools=[NOW], thinking={"type": "adaptive"})

    golden = re.sub("INPUT|OUTPUT|THINKING", r"\\d+", re.escape(TOOL_STREAM))
    assert re.fullmatch(golden, re.sub(r"toolu_\w+", "toolu_1", re.sub(r"msg_\w+", "msg_1", text))), text


async def test_a_stream_comes_to_the_same_message_as_without_one(serve_toy: ServeToy) -> None:
    client = await serve_toy()
    fields: dict[str, Any] = {"tools": TOOLS, "thinking": {"type": "adaptive"}}

    whole = await ask(client, f"{THOUGHT}I look.\n{CALL}\n{CALL_NOW}\nThat is all.", **fields)
    async with client.messages.stream(
        model="toy", max_tokens=512, messages=[says(f"{THOUGHT}I look.\n{CALL}\n{CALL_NOW}\nThat is all.")], **fields
    ) as stream:
        final = await stream.get_final_message()

    def told(message: Any) -> Any:
        blocks = message.model_dump(include={"content", "stop_reason", "stop_sequence", "usage", "model", "role"})
        return json.loads(re.sub(r"toolu_\w+", "toolu_1", json.dumps(blocks, default=str)))

    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use", "text"]
    assert told(final) == told(whole)


@pytest.mark.parametrize("text", ["hello", f"{THOUGHT}I look.\n{CALL}\n{CALL_NOW}"])
async def test_events_and_messages_have_what_the_clients_types_say_and_no_more(serve_toy: ServeToy, text: str) -> None:
    client = await serve_toy()
    fields: dict[str, Any] = {"tools": TOOLS, "thinking": {"type": "adaptive"}}

    events = events_of(await wire(client, text, stream=True, **fields))
    message = await wire(client, text, **fields)

    for event in events:
        if event["type"] != "ping":
            assert extras_of(STREAM.validate_python(event)) == []
            assert extras_of(BETA_STREAM.validate_python(event)) == []
    assert extras_of(Message.model_validate_json(message)) == []
    assert extras_of(BetaMessage.model_validate_json(message)) == []


async def test_a_stream_whose_text_begins_with_white_space_goes_on_after_it(serve_toy: ServeToy) -> None:
    client = await serve_toy(reasoning_parser="none", engine={"tokens_per_second": 200})

    events = events_of(await wire(client, "\n\n  hi", stream=True))

    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == "\n\n  hi"
    assert events[-1] == {"type": "message_stop"}


async def test_a_stream_of_a_server_that_stops_ends_with_an_error(
    serve_toy: ServeToy, toy_apps: list[web.Application]
) -> None:
    client = await serve_toy(engine={"tokens_per_second": 5.0})

    async with client.messages.stream(
        model="toy", max_tokens=512, messages=[{"role": "user", "content": "x" * 400}]
    ) as stream:
        texts = aiter(stream.text_stream)
        await anext(texts)
        end_all(toy_apps[-1])
        with pytest.raises(anthropic.APIStatusError) as error:
            async for _ in texts:
                pass

    body: Any = error.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "overloaded_error")

"""Fields of the objects in a request that their structs lack: a warning, unless official clients send them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import openai.types.chat as chat_types
import openai.types.responses as response_types
import pytest
from openai.types.chat.chat_completion_message import ChatCompletionMessage
from openai.types.shared_params import FunctionDefinition

from brlite.config.options import LimitsConfig
from brlite.dialects.anthropic import MessagesRequest
from brlite.dialects.anthropic import decode as decode_message
from brlite.dialects.llama_infill import decode as decode_infill
from brlite.dialects.object_fields import shape_of
from brlite.dialects.openai_chat import ChatCompletionRequest
from brlite.dialects.openai_chat import decode as decode_chat
from brlite.dialects.openai_tokens import decode_tokenize
from brlite.dialects.responses import ResponsesRequest
from brlite.dialects.responses import decode as decode_response
from brlite.dialects.scores import RERANK
from tests.server.conftest import Client, chat_body

CHAT = "/v1/chat/completions"
CALL = {"id": "c", "index": 0, "type": "function", "function": {"name": "f", "arguments": "{}", "frob": 1}}


CHATS = [
    {"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {}, "frob": 1}], "frob": {}},
    {"role": "assistant", "content": None, "annotations": [], "audio": None, "x": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "r"},
]


BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}, "frob": 1}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"any": 1}, "caller": {}}]},
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "r", "x": 1}]}],
    },
]


ITEMS = [
    {"type": "message", "id": "m", "status": "completed", "role": "user", "content": "q", "frob": 1},
    {"type": "web_search_call", "id": "w", "action": {}},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "r", "frob": 1}]},
]


SCHEMA = {"type": "object", "properties": {}, "frob": 1}


FUNCTION = {"name": "f", "parameters": SCHEMA, "frob": 1}


PATHS_IN_OBJECTS = [
    (
        decode_chat,
        {"messages": CHATS},
        "messages[].content[].frob messages[].frob messages[].tool_calls[].function.frob",
    ),
    (
        decode_chat,
        chat_body(tools=[{"type": "function", "frob": 1, "function": FUNCTION}]),
        "tools[].frob tools[].function.frob",
    ),
    (decode_chat, chat_body(metadata={"a": 1}, chat_template_kwargs={"b": 2}, response_format={"type": "text"}), ""),
    (
        decode_chat,
        chat_body(documents=[{"any": 1}], logit_bias={"1": 1}, tool_choice={"type": "x", "frob": 1}, tools=[]),
        "tool_choice.frob",
    ),
    (
        decode_response,
        {"input": ITEMS, "text": {"frob": 1, "format": {"type": "text"}}},
        "input[].frob input[].output[].frob text.frob",
    ),
    (
        decode_response,
        {"input": "q", "reasoning": {"frob": 1}, "tools": [{"type": "web_search", "x": 1}]},
        "reasoning.frob",
    ),
    (
        decode_response,
        {"input": "q", "tools": [{"type": "function", "defer_loading": True, **FUNCTION}]},
        "tools[].frob",
    ),
    (
        decode_message,
        {"messages": BLOCKS, "max_tokens": 5},
        "messages[].content[].content[].x messages[].content[].frob",
    ),
    (
        decode_message,
        {
            **chat_body(),
            "system": [{"type": "text", "text": "s", "frob": 1}],
            "thinking": {"type": "disabled", "frob": 1},
        },
        "system[].frob thinking.frob",
    ),
    (
        decode_message,
        {
            **chat_body(),
            "tools": [{"name": "f", "input_schema": SCHEMA, "frob": 1}, {"type": "web_search_1", "name": "w", "x": 1}],
        },
        "tools[].frob",
    ),
    (
        decode_infill,
        {"input_prefix": "", "input_suffix": "", "input_extra": [{"text": "", "time": 1, "x": 1}]},
        "input_extra[].x",
    ),
    (RERANK.decode, {"query": "q", "documents": [{"text": "a", "title": "t"}, "b"]}, "documents[].title"),
    (decode_tokenize, {"messages": CHATS[:1]}, "messages[].content[].frob messages[].frob"),
]


@pytest.mark.parametrize(("decode", "body", "expected"), PATHS_IN_OBJECTS)
def test_fields_of_objects_that_are_not_known_are_warned_of(
    decode: Callable[..., Any], body: Any, expected: str
) -> None:
    warnings = decode(json.dumps(body).encode(), LimitsConfig()).warnings

    told = [line.split("'")[1] for line in warnings if line.endswith("is not known and was ignored")]
    assert sorted(told) == expected.split()


async def test_a_field_of_an_object_is_told_in_the_last_chunk_and_refused_if_strict(client: Client) -> None:
    body = chat_body(messages=[{"role": "user", "content": "q", "frob": 1}])

    chunks = await client.stream(CHAT, body)
    status, refused = await client.post(CHAT, {**body, "strict": True})

    said = "the field 'messages[].frob' is not known and was ignored"
    assert [chunk["warnings"] for chunk in chunks if "warnings" in chunk] == [[said]]
    assert (status, refused["error"]["message"]) == (400, f"{said}; that is refused since strict is set")


@pytest.mark.parametrize(
    ("kind", "path", "sent", "others"),
    [
        (ChatCompletionRequest, "messages[]", ChatCompletionMessage, ""),
        (ChatCompletionRequest, "messages[].content[]", chat_types.ChatCompletionContentPartTextParam, ""),
        (ChatCompletionRequest, "tools[].function", FunctionDefinition, ""),
        (ResponsesRequest, "input[]", response_types.ResponseOutputMessage, ""),
        (ResponsesRequest, "input[].content[]", response_types.ResponseOutputText, ""),
        (ResponsesRequest, "input[]", response_types.ResponseReasoningItem, ""),
        (ResponsesRequest, "input[]", response_types.ResponseFunctionToolCall, "async_"),
        (ResponsesRequest, "tools[]", response_types.FunctionToolParam, "async allowed_callers"),
        (MessagesRequest, "messages[].content[]", anthropic.types.TextBlock, ""),
        (MessagesRequest, "messages[].content[]", anthropic.types.ThinkingBlock, ""),
        (MessagesRequest, "messages[].content[]", anthropic.types.ToolUseBlock, ""),
        (MessagesRequest, "messages[].content[]", anthropic.types.ToolResultBlockParam, ""),
        (MessagesRequest, "messages[].content[].source", anthropic.types.PlainTextSourceParam, ""),
        (MessagesRequest, "tools[]", anthropic.types.ToolParam, ""),
    ],
)
def test_what_official_clients_send_in_objects_makes_no_warning(kind: Any, path: str, sent: Any, others: str) -> None:
    shape = shape_of(kind)
    for step in path.replace("[]", ".[]").split("."):
        shape = shape.item if step == "[]" else shape.inner[step]  # type: ignore[assignment]  # it has items

    assert {*getattr(sent, "model_fields", sent.__annotations__)} - shape.names == {*others.split()}

"""The Responses dialect: golden wire texts of whole streams, and how a response ends that does not complete.

The texts are in tests/fixtures/responses, ids and all. `python -m tests.dialects.test_responses` writes them again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from msgspec import Raw
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel

from brlite.chat.tools import ToolCallDelta
from brlite.config.options import LimitsConfig
from brlite.dialects.errors import SERVER_FAULT
from brlite.dialects.event import Event, Token, TokenText, TokenUsage
from brlite.dialects.generation import Chat
from brlite.dialects.responses import DIALECT, decode
from brlite.dialects.responses_encoder import ResponsesEncoder
from brlite.dialects.responses_items import sealed
from brlite.dialects.responses_stored import FinishedResponse
from brlite.errors import EngineError, InvalidRequest, stopping
from brlite.sampling_params import StructuredOutput

GOLDEN = Path(__file__).parents[1] / "fixtures" / "responses"
LIMITS = LimitsConfig()
USAGE = TokenUsage(7, 5, 4, 2)
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True, "description": "Looks."},
    {"type": "custom", "name": "patch"},
    {"type": "namespace", "name": "shop", "description": "A shop.", "tools": [{"type": "function", "name": "buy"}]},
]
# What strict clients of other languages want to find, null or not.
RESPONSE_FIELDS = {
    *(
        "id",
        "object",
        "created_at",
        "completed_at",
        "status",
        "error",
        "incomplete_details",
        "model",
        "output",
        "usage",
    ),
    *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "parallel_tool_calls", "previous_response_id"),
    *("reasoning", "temperature", "top_p", "top_logprobs", "text", "tool_choice", "tools", "truncation", "user"),
    *("store", "service_tier", "background", "prompt_cache_key", "safety_identifier"),
}
EVENT_TYPES: dict[str, type[BaseModel]] = {
    get_args(each.model_fields["type"].annotation)[0]: each for each in get_args(get_args(ResponseStreamEvent)[0])
}


class Stream(NamedTuple):
    """A body, and the events of its answer."""

    fields: dict[str, Any]
    events: list[Event]


def piece(text: str, *, logprob: float) -> Event:
    other = TokenText(9, "\ufffd", b"\xf0")
    token = Token(TokenText(1, text, text.encode()), 0, logprob, ((TokenText(1, text, text.encode()), logprob),))
    return Event(choice=0, text=text, tokens=[token, Token(other, 0, -9999999.0, ())])


def call(*pieces: ToolCallDelta, **more: Any) -> Event:
    return Event(choice=0, text="", calls=pieces, **more)


STREAMS = {
    "plain": Stream(
        {"input": "hi", "instructions": "Be brief.", "temperature": 0.5, "metadata": {"a": "b"}, "user": "u"},
        [
            Event(choice=0, text="Hel"),
            Event(choice=0, text="lo\u2028"),
            Event(choice=0, text="", finish_reason="stop", warnings=("max_tokens was cut",)),
        ],
    ),
    "tool": Stream(
        {"input": "buy", "tools": TOOLS, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}},
        [
            Event(choice=0, text="", reasoning="I must "),
            Event(choice=0, text="", reasoning="look."),
            Event(choice=0, text="I look."),
            call(ToolCallDelta(0, id="call_a", name="look")),
            call(ToolCallDelta(0, '{"ok":')),
            call(ToolCallDelta(0, "true}")),
            call(ToolCallDelta(1, '{"input": "*** ', id="call_b", name="patch"), ToolCallDelta(1, 'Begin"}')),
            call(ToolCallDelta(2, "{}", id="call_c", name="shop.buy")),
            Event(choice=0, text="", finish_reason="tool_calls"),
        ],
    ),
    "structured": Stream(
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "ok?"}]}],
            "text": {"format": {"type": "json_schema", "name": "verdict", "schema": SCHEMA, "strict": True}},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 1,
        },
        [
            piece('{"ok"', logprob=-0.5),
            piece(":true}", logprob=0.0),
            Event(choice=0, text="", tokens=[], finish_reason="stop"),
        ],
    ),
    "cut": Stream(
        {"input": "count", "max_output_tokens": 2, "instructions": None, "store": False},
        [Event(choice=0, text="1 2", finish_reason="length")],
    ),
}


def make_encoder(fields: dict[str, Any], keep: Any = None) -> ResponsesEncoder:
    body = {"model": "m", "stream": True, **fields}
    made = ResponsesEncoder(decode(json.dumps(body).encode(), LIMITS, Store()), "resp_1", "m", "", keep)
    made._created = 7
    return made


def streamed(name: str) -> bytes:
    """The whole stream, with fixed times."""
    encoder = make_encoder(STREAMS[name].fields)
    frames = [encoder.opening(TokenUsage(7, 0, 0)), *map(encoder.encode, STREAMS[name].events), encoder.closing(USAGE)]
    return re.sub(rb'"completed_at":\d+', b'"completed_at":8', b"".join(frames))


def told(frames: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in frames.decode().split("\n") if line.startswith("data: ")]


def undeclared(model: BaseModel) -> list[str]:
    """The keys, of the model and of all models in it, that its type does not have."""
    found = list(model.model_extra or ())
    waiting: list[Any] = [getattr(model, name) for name in type(model).model_fields]
    while waiting:
        value = waiting.pop()
        if isinstance(value, BaseModel):
            found += undeclared(value)
        elif isinstance(value, list):
            waiting += value
    return found


class Store:
    """One stored response."""

    is_enabled = True

    def conversation(self, response_id: str) -> list[Raw] | None:
        return None

    def item(self, item_id: str) -> Raw | None:
        content = b'{"type":"message","id":"msg_1","role":"assistant","content":[{"type":"output_text","text":"Hi."}]}'
        return Raw(content) if item_id == "msg_1" else None


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_on_the_wire_as_its_golden_text(name: str) -> None:
    assert streamed(name).decode() == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STREAMS)
def test_each_event_has_all_fields_of_its_type_and_no_others(name: str) -> None:
    for event in told(streamed(name)):
        model = EVENT_TYPES[event["type"]].model_validate_json(json.dumps(event), strict=True)

        assert set(undeclared(model)) <= {"store", "warnings"}  # OpenAI's answers have `store`, its types do not


@pytest.mark.parametrize("name", STREAMS)
def test_each_response_in_a_stream_has_the_fields_that_may_be_null_too(name: str) -> None:
    for event in told(streamed(name)):
        if "response" in event:
            assert set(event["response"]) >= RESPONSE_FIELDS


@pytest.mark.parametrize("name", STREAMS)
def test_a_whole_response_is_that_of_the_stream(name: str) -> None:
    encoder = make_encoder(STREAMS[name].fields)

    body = json.loads(encoder.whole(STREAMS[name].events, USAGE, STREAMS[name].events[-1].warnings))

    last = told(streamed(name))[-1]["response"]
    assert {**body, "completed_at": last["completed_at"]} == last


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (EngineError("the step failed"), {"code": "server_error", "message": SERVER_FAULT}),
        (InvalidRequest("too long"), {"code": "invalid_prompt", "message": "too long"}),
        (stopping(1), {"code": "server_error", "message": str(stopping(1))}),
    ],
)
def test_a_failing_generation_ends_with_response_failed(error: Exception, shown: dict[str, str]) -> None:
    kept: list[FinishedResponse] = []
    encoder = make_encoder({"input": "hi"}, kept.append)

    frames = encoder.opening(USAGE) + encoder.encode(Event(choice=0, text="Hel")) + encoder.failing(error)

    *_, done, failed = told(frames)
    assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == shown
    assert EVENT_TYPES["response.failed"].model_validate_json(json.dumps(failed), strict=True)
    assert json.loads(kept[0].body) == failed["response"]  # a client may look what became of it


def test_a_stream_that_has_not_begun_fails_with_an_error_event() -> None:
    (event,) = told(make_encoder({"input": "hi"}).failing(InvalidRequest("too long", param="input", code="c")))

    assert event == {"type": "error", "sequence_number": 0, "code": "c", "message": "too long", "param": "input"}
    assert EVENT_TYPES["error"].model_validate_json(json.dumps(event), strict=True)


@pytest.mark.parametrize(
    ("ending", "kind", "status", "error"),
    [
        (Event(choice=0, text="", finish_reason="abort"), "response.incomplete", "incomplete", None),
        (
            Event(choice=0, text="", finish_reason="error", stop_reason="the grammar is at its end"),
            *("response.failed", "failed"),
            {"code": "server_error", "message": "the grammar is at its end"},
        ),
    ],
)
def test_a_response_that_is_not_whole_never_completes(ending: Event, kind: str, status: str, error: Any) -> None:
    encoder = make_encoder({"input": "hi"})

    frames = encoder.opening(USAGE) + encoder.encode(Event(choice=0, text="Hel")) + encoder.encode(ending)
    last = told(frames + encoder.closing(USAGE))[-1]

    assert (last["type"], last["response"]["status"], last["response"]["error"]) == (kind, status, error)
    assert (last["response"]["incomplete_details"], last["response"]["completed_at"]) == (None, None)
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert EVENT_TYPES[kind].model_validate_json(json.dumps(last), strict=True)


def turns(**fields: Any) -> list[dict[str, Any]]:
    call = decode(json.dumps({"model": "m", **fields}).encode(), LIMITS, Store())
    (chat,) = call.prompts
    assert isinstance(chat, Chat)
    return chat.messages


def test_instructions_stand_in_front_and_null_is_none() -> None:
    developer = {"role": "developer", "content": "Be kind."}
    user = {"role": "user", "content": "hi"}

    assert turns(input="hi", instructions=None) == [user]
    assert turns(input="hi", instructions="Be brief.") == [{"role": "system", "content": "Be brief."}, user]
    assert turns(input=[developer, user], instructions="Be brief.") == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        user,
    ]


def test_an_item_may_be_named_by_its_id() -> None:
    expected = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "So?"}]

    for reference in ({"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}):
        assert turns(input=[reference, {"role": "user", "content": "So?"}]) == expected
    with pytest.raises(InvalidRequest, match="'msg_2' not found") as refusal:
        turns(input=[{"type": "item_reference", "id": "msg_2"}])
    assert refusal.value.param == "input[0].id"


def test_an_item_whose_role_is_written_with_escapes_is_a_message() -> None:
    body = b'{"model": "m", "input": [{"id": "msg_9", "r\\u006fle": "user", "content": "hi"}]}'

    (chat,) = decode(body, LimitsConfig()).prompts

    assert chat.messages == [{"role": "user", "content": "hi"}]


def test_the_items_of_an_answer_become_one_turn_again() -> None:
    answer = json.loads(streamed("tool").decode().rsplit("data: ", 1)[1])["response"]["output"]
    outputs = [
        {"type": "function_call_output", "call_id": "call_a", "output": [{"type": "input_text", "text": "seen"}]},
        {"type": "custom_tool_call_output", "call_id": "call_b", "output": "done"},
    ]

    _, assistant, *results = turns(input=[{"role": "user", "content": "buy"}, *answer, *outputs], tools=TOOLS)

    assert (assistant["reasoning_content"], assistant["content"]) == ("I must look.", "I look.")
    assert [(each["id"], each["function"]["name"]) for each in assistant["tool_calls"]] == [
        ("call_a", "look"),
        ("call_b", "patch"),
        ("call_c", "shop.buy"),
    ]
    assert [(each["tool_call_id"], each["content"]) for each in results] == [("call_a", "seen"), ("call_b", "done")]


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ({"type": "function", "function": {"name": "look"}}, {"type": "function", "name": "look"}),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "look"}}]}},
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]},
        ),
    ],
)
def test_a_tool_choice_in_the_shape_of_chats_is_read(wanted: Any, shown: Any) -> None:
    call = decode(json.dumps({"input": "hi", "tools": TOOLS, "tool_choice": wanted}).encode(), LIMITS)

    assert (call.tool_choice.mode, call.tool_choice.names) == ("required", ("look",))
    assert call.shown["tool_choice"] == shown


@pytest.mark.parametrize("choice", ["required", {"type": "web_search"}, {"type": "function", "name": "look"}])
def test_a_choice_of_tools_that_were_left_out_is_refused(choice: Any) -> None:
    body = {"input": "hi", "tools": [{"type": "web_search"}], "tool_choice": choice}

    with pytest.raises(InvalidRequest, match="a call is required, and the tool web_search was left out"):
        decode(json.dumps(body).encode(), LIMITS)


def test_turns_and_results_without_text_are_empty() -> None:
    items = [
        {"role": "assistant", "content": None},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": None},
    ]

    (chat,) = decode(json.dumps({"input": items}).encode(), LIMITS).prompts

    assert isinstance(chat, Chat)
    assert [turn["content"] for turn in chat.messages] == ["", ""]


def test_a_stored_prompt_is_refused_in_words_of_this_api() -> None:
    with pytest.raises(InvalidRequest, match="; use input or /v1/completions") as refusal:
        decode(b'{"input": "hi", "prompt": {"id": "pmpt_1"}}', LIMITS)

    assert refusal.value.param == "prompt"


def test_reasoning_comes_back_from_its_encrypted_content_alone() -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": sealed("I must look.")}

    assert turns(input=[item, {"role": "assistant", "content": "Hi."}]) == [
        {"role": "assistant", "content": "Hi.", "reasoning_content": "I must look."}
    ]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutput(json_object=True, param="text.format")),
        (
            {"type": "json_schema", "name": "v", "schema": SCHEMA},
            StructuredOutput(json_schema=json.dumps(SCHEMA), param="text.format"),
        ),
    ],
)
def test_the_format_of_the_text_is_a_structured_output(wanted: dict[str, Any], expected: Any) -> None:
    body = {"model": "m", "input": "x", "text": {"format": wanted}}

    assert decode(json.dumps(body).encode(), LIMITS).params.structured == expected


def test_the_dialect_is_that_of_the_path() -> None:
    assert (DIALECT.path, DIALECT.id_prefix) == ("/v1/responses", "resp_")


if __name__ == "__main__":
    for name in STREAMS:
        (GOLDEN / f"{name}.txt").write_bytes(streamed(name))

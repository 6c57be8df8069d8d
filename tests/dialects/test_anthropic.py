"""Golden pairs of Anthropic's dialect: a body and what it asks for, events and their bytes, and what is refused."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from typing import Any

import pytest

from brlite.chat.tools import ToolCallDelta, ToolChoice
from brlite.config.options import LimitsConfig
from brlite.dialects.anthropic import DIALECT, MessagesRequest, decode, decode_count_tokens
from brlite.dialects.event import Event, TokenUsage
from brlite.dialects.generation import Chat, Generation, ReasoningHint
from brlite.errors import EngineError, InvalidRequest, RequestError
from brlite.sampling_params import StructuredOutput

HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "now", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "toolu_a", "name": "now", "input": {"at": 1}}


def decoded(**fields: Any) -> Generation:
    return decode(json.dumps({"max_tokens": 5, "messages": HI, **fields}).encode(), LimitsConfig())


def chat_of(**fields: Any) -> Chat:
    (chat,) = decoded(**fields).prompts
    assert isinstance(chat, Chat)
    return chat


def says(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def told(frames: bytes) -> list[Any]:
    return [json.loads(frame.split("\ndata: ")[1]) for frame in frames.decode().split("\n\n")[:-1]]


def test_neighbours_of_one_role_are_one_turn_and_results_come_first() -> None:
    chat = chat_of(
        system=[text("x-anthropic-billing-header: cch=1;"), text("Be"), text("brief.")],
        messages=[
            says("In English.", "system"),
            says("a"),
            says([text("b"), text("c")]),
            says(
                [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, text("I "), text("look."), USE], "assistant"
            ),
            says([text("d"), {"type": "tool_result", "tool_use_id": "toolu_a", "content": [text("1"), text("2")]}]),
            says("Now in French.", "system"),
            says("e"),
        ],
    )

    assert chat.messages == [
        {"role": "system", "content": "Be\n\nbrief.\n\nIn English."},
        {"role": "user", "content": "a\n\nb\n\nc"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "toolu_a", "type": "function", "function": {"name": "now", "arguments": '{"at": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_a", "content": "1\n2"},
        {"role": "user", "content": "d\n\n<system>\nNow in French.\n</system>\n\ne"},
    ]
    assert (chat.add_generation_prompt, chat.continue_final_message) == (True, False)


def test_documents_and_search_results_are_read_as_text() -> None:
    plain = {"type": "text", "media_type": "text/plain", "data": "The Rhine is long."}
    found = {"type": "search_result", "source": "http://x", "title": "Elbe", "content": [text("It is"), text("wide.")]}
    parts = {"type": "content", "content": [text("a"), text("b")]}

    call = decoded(
        messages=[
            says([{"type": "document", "source": plain, "title": "Rivers", "context": "of 1990"}, text("How long?")]),
            says([USE], "assistant"),
            says([{"type": "tool_result", "tool_use_id": "toolu_a", "content": [found]}]),
            says([{"type": "document", "source": parts, "citations": {"enabled": True}}]),
        ]
    )

    (chat,) = call.prompts
    assert isinstance(chat, Chat)
    assert [turn["content"] for turn in chat.messages] == [
        "<document>\nRivers\nof 1990\nThe Rhine is long.\n</document>\n\nHow long?",
        "",
        "<search_result>\nElbe\nhttp://x\nIt is\nwide.\n</search_result>",
        "<document>\na\nb\n</document>",
    ]
    assert call.warnings == ("citations are not made: the answer has none",)


@pytest.mark.parametrize(
    ("last", "continues", "num_turns"),
    [
        (says("The", "assistant"), True, 2),
        (says([text("Th"), text("e")], "assistant"), True, 2),
        (says("", "assistant"), False, 1),
        (says([USE], "assistant"), False, 2),
    ],
)
def test_text_of_the_assistant_at_the_end_is_continued(last: Any, continues: bool, num_turns: int) -> None:
    chat = chat_of(messages=[*HI, last])

    assert (chat.continue_final_message, chat.add_generation_prompt) == (continues, not continues)
    assert len(chat.messages) == num_turns


def test_what_a_body_asks_for_stands_in_the_generation() -> None:
    schema = {"type": "object"}
    call = decoded(
        model="m",
        stream=True,
        stop_sequences=["x"],
        temperature=0.5,
        top_k=3,
        tools=[{**TOOL, "input_examples": [{"a": 1}], "strict": True}, {"type": "web_search_20250305", "name": "web"}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        output_config={"effort": "max", "format": {"type": "json_schema", "schema": schema}},
        thinking={"type": "enabled", "budget_tokens": 2000},
        metadata={"user_id": "u"},
        cache_control={"type": "ephemeral"},
        service_tier="auto",
        betas=["a"],
        frob=1,
    )

    (chat,) = call.prompts
    assert isinstance(chat, Chat)
    assert (call.model, call.is_streamed, call.keeps_order, call.shows_reasoning) == ("m", True, True, True)
    assert (call.params.max_tokens, call.params.stop, call.params.temperature, call.params.top_k) == (5, ("x",), 0.5, 3)
    assert call.params.structured == StructuredOutput(json_schema='{"type": "object"}', param="output_config.format")
    assert call.tool_choice == ToolChoice(mode="required", parallel=False)
    assert [(tool.name, tool.description, tool.strict) for tool in chat.tools] == [
        ("now", 'Examples of its input:\n{"a":1}', True)
    ]
    assert chat.reasoning_hint == ReasoningHint(True, "high", "output_config.effort")
    said = "; ".join(call.warnings)
    for word in ("frob", "web_search_20250305", "budget_tokens", "effort max"):
        assert word in said
    assert len(call.warnings) == 4


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ({"type": "auto"}, ToolChoice()),
        ({"type": "none"}, ToolChoice(mode="none")),
        ({"type": "tool", "name": "now"}, ToolChoice(mode="required", names=("now",), is_named=True, parallel=False)),
    ],
)
def test_a_choice_of_tools(choice: Any, expected: ToolChoice) -> None:
    assert decoded(tools=[TOOL], tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [says("", "assistant")]}, "messages"),
        ({"messages": [says("x", "robot")]}, "messages.0.role"),
        ({"messages": [says([text("x"), {"type": "image", "source": {}}])]}, "messages.0.content.1"),
        ({"messages": [says([{"type": "document"}])]}, "messages.0.content.0.source"),
        ({"messages": [says([{"type": "document", "source": {"type": "url"}}])]}, "messages.0.content.0.source"),
        ({"messages": [says([{"type": "document", "source": {"type": "text"}}])]}, "messages.0.content.0.source.data"),
        (
            {"messages": [says([{"type": "document", "source": {"type": "content", "content": [{"type": "image"}]}}])]},
            "messages.0.content.0.source.content.0",
        ),
        ({"messages": [says([{"type": "search_result", "source": "u"}])]}, "messages.0.content.0.content"),
        ({"messages": [says([{"type": "search_result", "content": [USE]}])]}, "messages.0.content.0.content.0"),
        ({"messages": [says([{"type": "text"}])]}, "messages.0.content.0.text"),
        ({"messages": [*HI, says([{"type": "tool_use", "name": "n"}], "assistant")]}, "messages.1.content.0.id"),
        ({"messages": [*HI, says([{**USE, "input": [1]}], "assistant")]}, "messages.1.content.0.input"),
        (
            {"messages": [says([{"type": "tool_result", "tool_use_id": "x", "content": ""}])]},
            "messages.0.content.0.tool_use_id",
        ),
        (
            {
                "messages": [
                    says([USE], "assistant"),
                    says([{"type": "tool_result", "tool_use_id": "toolu_a", "content": 5}]),
                ]
            },
            "messages.1.content.0.content",
        ),
        (
            {
                "messages": [
                    says([USE], "assistant"),
                    says([{"type": "tool_result", "tool_use_id": "toolu_a", "content": [{"type": "image"}]}]),
                ]
            },
            "messages.1.content.0.content.0",
        ),
        ({"system": [{"type": "image"}]}, "system.0"),
        ({"tools": [TOOL, {"type": "bash_20250124", "name": "bash"}]}, "tools.1.type"),
        ({"tools": [{"type": "computer_20250124", "name": "computer"}]}, "tools.0.type"),
        ({"tools": [{"name": "n"}]}, "tools.0.input_schema"),
        ({"tools": [{"type": f"web_search_{number}"} for number in range(300)]}, "tools"),
        ({"tools": [{"type": "web_search_20250305"}, {**TOOL, "name": "a b"}]}, "tools.1.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305"}], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences"),
        ({"stop_sequences": ["x", ""]}, "stop_sequences"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decoded(**fields)

    assert refusal.value.param == param


ODD = (5, -1, 1e300, True, "x", "", [], [5], [[]], [{}], [None], {}, {"type": 5}, {"type": "x"}, {"type": None}, None)


@pytest.mark.parametrize("name", MessagesRequest.__struct_fields__)
def test_any_value_of_any_field_is_taken_or_refused(name: str) -> None:
    for decode_body, value in itertools.product((decode, decode_count_tokens), ODD):
        for nested in (value, [value], {"type": value, "name": value, "effort": value, "format": value}):
            body = json.dumps({"max_tokens": 5, "messages": HI, name: nested}).encode()
            with suppress(RequestError):
                assert isinstance(decode_body(body, LimitsConfig()), Generation)


@pytest.mark.parametrize(
    "key",
    [
        *("type", "text", "thinking", "id", "name", "input", "tool_use_id", "content", "is_error"),
        *("source", "title", "context", "citations"),
    ],
)
@pytest.mark.parametrize(
    "kind", ["text", "thinking", "tool_use", "tool_result", "server_tool_use", "image", "document", "search_result"]
)
def test_any_value_in_a_block_is_taken_or_refused(kind: str, key: str) -> None:
    block = {"type": kind, "text": "x", "thinking": "x", "id": "i", "name": "n", "tool_use_id": "toolu_a"}
    for role, value in itertools.product(("user", "assistant", "system"), ODD):
        block[key] = value
        refusal = None
        try:
            decoded(messages=[says([USE], "assistant"), says([block], role)], system=[block])
        except InvalidRequest as error:
            refusal = error

        assert refusal is None or refusal.param is not None, (role, value)


def test_tools_of_64_kilobytes_are_taken() -> None:
    tools = [{**TOOL, "name": f"tool_{number}", "description": "x" * 1000} for number in range(64)]

    assert len(chat_of(tools=tools).tools) == 64


USAGE = TokenUsage(prompt=10, completion=4, cached=3, reasoning=1)
SHOWN = {
    "input_tokens": 7,
    "output_tokens": 4,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 3,
    "output_tokens_details": {"thinking_tokens": 1},
}


def streamed(*events: Event) -> list[Any]:
    encoder = DIALECT.make_encoder(decoded(), "msg_1", "m", "")
    return told(b"".join(map(encoder.encode, events)) + encoder.closing(USAGE))


def whole(*events: Event, warnings: tuple[str, ...] = ()) -> Any:
    return json.loads(DIALECT.make_encoder(decoded(), "msg_1", "m", "").whole(events, USAGE, warnings))


def say(words: str = "", **fields: Any) -> Event:
    return Event(choice=0, text=words, **fields)


def call(number: int, arguments: str = "", name: str | None = None) -> Event:
    delta = ToolCallDelta(number, arguments, id=f"call_{number}" if name else None, name=name)
    return Event(choice=0, text="", calls=(delta,))


EVENTS = (
    say("\n"),
    say(reasoning="Hm"),
    say(reasoning="."),
    say("\n"),
    say("So"),
    say(" it"),
    call(0, name="now"),
    call(0, '{"a":'),
    call(0, "1}"),
    say("\n"),
    call(1, name="now"),
    say("\n"),
    say("\nEnd"),
    say(finish_reason="stop"),
)


def test_white_space_between_blocks_is_no_block() -> None:
    blocks: dict[int, list[Any]] = {}
    for event in streamed(*EVENTS):
        if event["type"].startswith("content_block"):
            blocks.setdefault(event["index"], []).append(event)

    assert [parts[0]["content_block"]["type"] for parts in blocks.values()] == [
        *("thinking", "text", "tool_use", "tool_use", "text"),
    ]
    assert list(blocks) == [0, 1, 2, 3, 4]
    for parts in blocks.values():
        assert (parts[0]["type"], parts[-1]["type"]) == ("content_block_start", "content_block_stop")
    assert [part["delta"] for part in blocks[0][1:-1]] == [
        {"type": "thinking_delta", "thinking": "Hm"},
        {"type": "thinking_delta", "thinking": "."},
        {"type": "signature_delta", "signature": "brlite"},
    ]
    assert [part["delta"]["text"] for part in blocks[1][1:-1]] == ["\nSo", " it"]
    assert [part["delta"]["partial_json"] for part in blocks[2][1:-1]] == ['{"a":', "1}"]
    assert [part["delta"]["text"] for part in blocks[4][1:-1]] == ["\n\nEnd"]


def test_a_whole_message_has_the_blocks_of_the_stream() -> None:
    message = whole(*EVENTS, warnings=("mind",))

    assert message == {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "brlite"},
            {"type": "text", "text": "\nSo it"},
            {"type": "tool_use", "id": "toolu_0", "name": "now", "input": {"a": 1}},
            {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}},
            {"type": "text", "text": "\n\nEnd"},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": SHOWN,
        "warnings": ["mind"],
    }


@pytest.mark.parametrize(
    ("events", "reason", "sequence"),
    [
        ((say("a", finish_reason="stop"),), "end_turn", None),
        ((say("a", finish_reason="length"),), "max_tokens", None),
        ((say("a", finish_reason="stop", stop_reason="x"),), "stop_sequence", "x"),
        ((say("a", finish_reason="stop", stop_reason=7),), "end_turn", None),
        ((call(0, "{}", "now"), say(finish_reason="tool_calls")), "tool_use", None),
        ((call(0, "{}", "now"), say(finish_reason="stop")), "tool_use", None),
        ((call(0, "{", "now"), say(finish_reason="length")), "max_tokens", None),
    ],
)
def test_why_an_answer_ended(events: tuple[Event, ...], reason: str, sequence: str | None) -> None:
    ending = {"stop_reason": reason, "stop_sequence": sequence}

    assert streamed(*events)[-2:] == [
        {"type": "message_delta", "delta": ending, "usage": SHOWN},
        {"type": "message_stop"},
    ]
    assert {name: whole(*events)[name] for name in ending} == ending


def test_white_space_alone_is_a_text() -> None:
    events = streamed(say("\n", finish_reason="stop"))

    assert [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"] == ["\n"]
    assert whole(say("\n", finish_reason="stop"))["content"] == [{"type": "text", "text": "\n"}]


def test_what_cannot_be_made_is_an_error() -> None:
    (error,) = streamed(say("a", finish_reason="error"))[-1:]

    assert (error["type"], error["error"]["type"]) == ("error", "api_error")
    with pytest.raises(EngineError):
        whole(say("a", finish_reason="error"))


def test_many_messages_of_one_role_beside_a_long_one_are_joined_once() -> None:
    long = says("x" * 1_000_000, "assistant")

    chat = chat_of(messages=[long, *[says("a", "assistant")] * 4000])

    assert [len(turn["content"]) for turn in chat.messages] == [1_000_000 + 4000 * len("\n\na")]

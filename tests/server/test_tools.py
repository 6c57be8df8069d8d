"""Tools over HTTP: the toy says again what it was told, so a user's words are the model's reply."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest

from brlite.app import create_app
from brlite.chat.tool_calls import PARSERS
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine
from tests.api_clients import openai_client

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, NOW]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city":"Paris","days":2}}\n</tool_call>'
CALL_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

Ask = Callable[..., Awaitable[Any]]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[openai.AsyncOpenAI]]]:
    """`await serve(tool_parser=…)` serves the toy with these options of its model, and returns a client."""
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> openai.AsyncOpenAI:
            spec = ModelSpec(name="toy", path=None, build_seq=4096, **options)
            config = Config(model=(spec,), engine=EngineConfig(name="toy"), limits=LimitsConfig(max_tools=4))
            engine = await stack.enter_async_context(AsyncEngine.from_config(config))
            server = HttpServer(create_app(engine, config), "127.0.0.1", 0, config.limits, grace_seconds=0.2)
            await stack.enter_async_context(server)
            return await stack.enter_async_context(openai_client(server.url))

        yield start


def words(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def ask(client: openai.AsyncOpenAI, text: str, **fields: Any) -> Any:
    fields = {"tools": TOOLS, "messages": words(text), "temperature": 0, **fields}
    return await client.chat.completions.create(model="toy", **fields)


async def ask_in_pieces(client: openai.AsyncOpenAI, text: str, **fields: Any) -> list[Any]:
    return [chunk async for chunk in await ask(client, text, stream=True, **fields)]


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


async def test_an_agents_two_turns(serve: Ask) -> None:
    client = await serve()

    first = (await ask(client, f"I look.\n{CALL}\n{CALL_NOW}")).choices[0]
    messages = [
        *words("q"),
        first.message.model_dump(exclude_none=True),
        *({"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in first.message.tool_calls),
        *words("So it is sunny."),
    ]
    second = (await ask(client, "", messages=messages)).choices[0]

    assert first.finish_reason == "tool_calls"
    assert first.message.content == "I look."
    assert calls_of(first.message) == [("get_weather", '{"city":"Paris","days":2}'), ("now", "{}")]
    assert len({call.id for call in first.message.tool_calls}) == 2
    assert second.finish_reason == "stop"
    assert second.message.tool_calls is None
    assert "<tool_response>\nsunny\n</tool_response>\nSo it is sunny." in second.message.content


async def test_a_turn_of_calls_may_have_null_content(serve: Ask) -> None:
    client = await serve()
    turn = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": NOW["function"]}]}
    turn["tool_calls"][0]["function"] = {"name": "now", "arguments": "{}"}  # type: ignore[index]

    for content in ({"content": None}, {"content": ""}, {}):
        messages = [*words("q"), {**turn, **content}, {"role": "tool", "tool_call_id": "a", "content": "5"}]
        answer = await ask(client, "", messages=messages)
        assert answer.choices[0].message.content == "<tool_response>\n5\n</tool_response>"


async def test_a_stop_string_inside_a_call_ends_the_answer_without_the_reason_of_calls(serve: Ask) -> None:
    client = await serve()

    answer = await ask(client, f"{CALL_NOW}\n{CALL}", stop=["Par"])
    whole = await ask(client, f"{CALL_NOW}\n{CALL}", stop=["Rome"])

    assert answer.choices[0].finish_reason == "stop"
    assert calls_of(answer.choices[0].message)[0] == ("now", "{}")
    assert "looks like a tool call" in answer.warnings[0]
    assert whole.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("text", [f"I look.\n{CALL}\n{CALL_NOW}", CALL, "No call < here.", "<tool_call>\n{bad", ""])
async def test_a_stream_says_what_a_whole_answer_says(serve: Ask, text: str) -> None:
    client = await serve()

    whole = (await ask(client, text or " ")).choices[0]
    chunks = await ask_in_pieces(client, text or " ")

    deltas = [chunk.choices[0].delta for chunk in chunks]
    pieces = [call for delta in deltas for call in delta.tool_calls or ()]
    assert "".join(delta.content or "" for delta in deltas) == (whole.message.content or "")
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    for index, call in enumerate(whole.message.tool_calls or ()):
        mine = [piece for piece in pieces if piece.index == index]
        assert [piece.id is not None for piece in mine] == [True] + [False] * (len(mine) - 1)
        assert (mine[0].function.name, mine[0].type) == (call.function.name, "function")
        assert "".join(piece.function.arguments for piece in mine) == call.function.arguments


async def test_arguments_are_streamed_as_they_come(serve: Ask) -> None:
    client = await serve()

    chunks = await ask_in_pieces(client, CALL)

    pieces = [call.function.arguments for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert len(pieces) > 5
    assert "".join(pieces) == '{"city":"Paris","days":2}'


async def test_none_means_that_text_stays_text(serve: Ask) -> None:
    client = await serve()

    none = (await ask(client, CALL, tool_choice="none")).choices[0]
    without = (await ask(client, CALL, tools=openai.NOT_GIVEN)).choices[0]
    null = (await ask(client, CALL, tools=None)).choices[0]

    for choice in (none, without, null):
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


async def test_a_named_function_is_called_and_ends_with_stop(serve: Ask) -> None:
    client = await serve()
    named = {"type": "function", "function": {"name": "get_weather"}}

    choice = (await ask(client, CALL, tool_choice=named)).choices[0]

    assert choice.finish_reason == "stop"
    assert calls_of(choice.message) == [("get_weather", '{"city":"Paris","days":2}')]


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "now"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]},
    ],
)
async def test_a_tool_choice_in_the_shape_of_responses_is_read(serve: Ask, choice: Any) -> None:
    client = await serve()

    forced = (await ask(client, "I would rather talk.", tool_choice=choice, max_tokens=400)).choices[0]

    assert calls_of(forced.message)[0] == ("now", "{}")


@pytest.mark.parametrize("text", [CALL_NOW, "I would rather talk."])
async def test_a_call_is_forced_whatever_the_model_would_say(serve: Ask, text: str) -> None:
    client = await serve()
    named = {"type": "function", "function": {"name": "now"}}

    required = (await ask(client, text, tool_choice="required", max_tokens=400, temperature=0)).choices[0]
    forced = (await ask(client, text, tool_choice=named, max_tokens=400)).choices[0]

    if required.finish_reason != "length":
        assert required.finish_reason == "tool_calls"
        for call in required.message.tool_calls:
            assert isinstance(json.loads(call.function.arguments), dict)
    assert forced.message.content is None
    assert calls_of(forced.message) == [("now", "{}")]


async def test_only_allowed_tools_are_called(serve: Ask) -> None:
    client = await serve()
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}

    choice = (await ask(client, CALL_NOW, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})).choices[0]

    assert calls_of(choice.message) == [("now", "{}")]


async def test_the_functions_of_old_clients(serve: Ask) -> None:
    client = await serve()
    fields = {"tools": openai.NOT_GIVEN, "functions": [tool["function"] for tool in TOOLS]}

    first = (await ask(client, CALL, **fields)).choices[0]
    chunks = await ask_in_pieces(client, CALL, **fields)
    messages = [
        *words("q"),
        first.message.model_dump(exclude_none=True),
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    second = (await ask(client, "", messages=messages, **fields)).choices[0]

    assert first.finish_reason == chunks[-1].choices[0].finish_reason == "function_call"
    assert first.message.function_call.name == "get_weather"
    pieces = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert "".join(piece.arguments for piece in pieces) == first.message.function_call.arguments
    assert second.message.content == "<tool_response>\nsunny\n</tool_response>"


async def test_a_broken_call_is_content_with_a_warning(serve: Ask) -> None:
    client = await serve(tool_parser="qwen3_coder")
    text = "<tool_call>\n<function=rm>\n</function>\n</tool_call>"
    unenforced = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}

    answer = await ask(
        client, text, tools=[{"type": "function", "function": {"name": "now", "parameters": unenforced}}]
    )

    assert "calls of tools are not constrained: tools: now: at #/properties/a/uniqueItems" in answer.warnings[0]
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")
    assert any("is passed on as content" in warning for warning in answer.warnings)


@pytest.mark.parametrize(
    ("tool_parser", "name", "place"),
    [("none", "f", "format none"), ("pythonic", "a/b", "format pythonic"), ("hermes", "f", "f: at #/properties/a/not")],
)
async def test_strict_without_a_grammar_is_refused_and_auto_says_that_calls_are_free(
    serve: Ask, tool_parser: str, name: str, place: str
) -> None:
    client = await serve(tool_parser=tool_parser)
    parameters = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}  # type: ignore[dict-item]

    free = await ask(client, "Hello.", tools=[tool])
    with pytest.raises(openai.BadRequestError, match=place) as caught:
        await ask(client, "Hello.", tools=[NOW, strict])

    assert free.choices[0].message.content == "Hello."
    assert "calls of tools are not constrained" in free.warnings[0]
    assert caught.value.param == "tools"


@pytest.mark.parametrize("tool_parser", sorted(set(PARSERS) - {"harmony"}))
async def test_a_strict_function_is_constrained_in_every_format(serve: Ask, tool_parser: str) -> None:
    client = await serve(tool_parser=tool_parser)
    city = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}  # it comes to an end
    strict = {"type": "function", "function": {"name": "get_weather", "parameters": city, "strict": True}}

    free = await ask(client, "Hello.", tools=[strict])
    forced = await ask(client, "Hello.", tools=[strict], tool_choice="required", parallel_tool_calls=False)

    assert free.choices[0].message.content == "Hello."
    assert getattr(free, "warnings", None) is None
    assert forced.choices[0].message.content is None
    ((name, arguments),) = calls_of(forced.choices[0].message)
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})


async def test_reasoning_is_told_apart(serve: Ask) -> None:
    client = await serve(reasoning_parser="think")
    text = f"<think>\nI must look.\n</think>\n\n{CALL}"

    whole = (await ask(client, text)).choices[0].message
    chunks = await ask_in_pieces(client, text)
    hidden = (await ask(client, text, extra_body={"include_reasoning": False})).choices[0].message
    in_text = (await ask(client, text, extra_body={"separate_reasoning": False})).choices[0].message

    assert (whole.reasoning_content, whole.content) == ("I must look.", None)
    assert len(whole.tool_calls) == 1
    streamed = (getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert "".join(streamed) == "I must look."
    assert getattr(hidden, "reasoning_content", None) is None
    assert in_text.content == "<think>\nI must look.\n</think>"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [*TOOLS, *TOOLS, *TOOLS]}, "tools"),
        ({"tools": [*TOOLS, NOW]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].name"),
        ({"tools": [NOW, {"type": "function", "function": {"name": "a\nb"}}]}, "tools[1].name"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
        ({"tools": openai.NOT_GIVEN, "tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs"),
        ({"extra_body": {"documents": [{"text": "x"}]}}, "documents"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
async def test_what_cannot_be_obeyed_is_refused_by_name(serve: Ask, fields: dict[str, Any], param: str) -> None:
    client = await serve()

    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, "x", **fields)

    assert caught.value.param == param


async def test_a_variable_that_no_template_reads_is_a_warning_and_a_forced_one_an_error(serve: Ask) -> None:
    client = await serve(chat_template_kwargs={"enable_thinking": False}, force_chat_template_kwargs=True)

    same = await ask(client, "x", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    with pytest.raises(openai.BadRequestError, match="the server sets 'enable_thinking'"):
        await ask(client, "x", extra_body={"chat_template_kwargs": {"enable_thinking": True}})

    assert same.warnings == ["chat_template_kwargs: the model's template does not read 'enable_thinking'"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_call_that_the_length_cuts_in_its_mark_is_content_with_a_warning(
    serve: Callable[..., Awaitable[openai.AsyncOpenAI]], is_streamed: bool
) -> None:
    client = await serve()
    fields = {"max_tokens": len("Well: <tool"), "messages": words("Well: " + CALL), "n": 2}

    if is_streamed:
        chunks = await ask_in_pieces(client, "", **fields)
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == 0]
        content = "".join(choice.delta.content or "" for choice in choices)
        warnings = [line for chunk in chunks for line in (chunk.model_extra or {}).get("warnings", ())]
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = await ask(client, "", **fields)
        content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        warnings = (answer.model_extra or {}).get("warnings", [])

    assert reason == "length"
    assert content.endswith("<tool")
    assert len(warnings) == 1
    assert "which may begin a tool call: it is content" in warnings[0]


@pytest.mark.parametrize("tool_choice", ["auto", "none", "required"])
@pytest.mark.parametrize(
    ("parameters", "param", "reason"),
    [
        ('{"maximum": 1e999}', "tools", "tool f.*out of range"),
        ('{"maximum": 1' + "0" * 5000 + "}", "tools", "tool f.*out of range"),
        ("[" * 100_000, None, "nested too deeply"),
        ("[]", "tools[0].function.parameters", "Expected `object"),
        ('"{}"', "tools[0].function.parameters", "Expected `object"),
    ],
)
async def test_a_schema_is_checked_whether_or_not_it_is_enforced(
    serve: Ask, tool_choice: str, parameters: str, param: str | None, reason: str
) -> None:
    client = await serve()
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {parameters}}}}}'
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], "tools": [{tool}], "tool_choice": "{tool_choice}"}}'

    with pytest.raises(openai.BadRequestError, match=reason) as refusal:
        await client.post("/chat/completions", cast_to=object, content=body.encode())

    assert refusal.value.param == param

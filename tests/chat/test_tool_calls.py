"""Calls of tools in replies: read in every format, the same however the text is cut, and what is no call stays text."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brlite.chat.reply import ReplyParser
from brlite.chat.tool_calls import PARSERS, find_parser
from brlite.chat.tool_calls.parser import MAX_WARNINGS
from brlite.chat.tools import TextDelta, ToolCallDelta, ToolCallEnd, collect
from tests.chat.replies import CASES, TOOLS, ReplyCase, function, joined, order, read

# Formats without quotes cannot write their own marks, or line feeds at the ends of a text.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\n"), max_size=6)
ARGUMENTS = st.fixed_dictionaries({"city": PLAIN}, optional={"days": st.integers(), "zip": PLAIN})
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parser}: {case.text[:30]!r}")


@each_case
@pytest.mark.parametrize("streams", [False, True])
def test_a_reply_is_read_as_content_and_calls(case: ReplyCase, streams: bool) -> None:
    parser = PARSERS[case.parser](TOOLS, streams_arguments=streams)

    reply = collect(read(parser, [case.text]))

    assert reply.content == case.content
    assert [(call.name, json.loads(call.arguments)) for call in reply.tool_calls] == list(case.calls)
    assert parser.num_calls == len(case.calls)
    assert parser.warnings == []


@each_case
@pytest.mark.parametrize("streams", [False, True])
def test_a_reply_in_single_characters_is_the_same(case: ReplyCase, streams: bool) -> None:
    whole = read(PARSERS[case.parser](TOOLS, streams_arguments=streams), [case.text])

    by_character = read(PARSERS[case.parser](TOOLS, streams_arguments=streams), list(case.text))

    assert joined(by_character) == joined(whole)
    assert order(by_character) == order(whole)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.integers(0, 400), max_size=8), st.booleans(), st.data())
def test_any_cuts_of_whole_and_broken_replies_give_the_same_events(
    case: ReplyCase, places: list[int], streams: bool, data: st.DataObject
) -> None:
    start, length = data.draw(st.integers(0, len(case.text))), data.draw(st.integers(0, 4))
    text = case.text[:start] + data.draw(st.text(max_size=3)) + case.text[start + length :]
    borders = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    parsers = [PARSERS[case.parser](TOOLS, streams_arguments=streams) for _ in range(2)]

    whole, cut = read(parsers[0], [text]), read(parsers[1], pieces)

    assert joined(cut) == joined(whole)
    assert order(cut) == order(whole)
    assert parsers[1].warnings == parsers[0].warnings


@each_case
def test_a_call_begins_with_its_id_and_name_and_has_an_end(case: ReplyCase) -> None:
    events = read(PARSERS[case.parser](TOOLS, streams_arguments=True), list(case.text))

    for index in range(len(case.calls)):
        deltas = [event for event in events if isinstance(event, ToolCallDelta) and event.index == index]
        assert [delta.id is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
        assert deltas[0].name == case.calls[index][0]
        assert events.count(ToolCallEnd(index)) == 1
    ids = [event.id for event in events if isinstance(event, ToolCallDelta) and event.id]
    assert len(set(ids)) == len(case.calls)


def test_arguments_come_as_they_are_written_where_a_grammar_guarantees_them() -> None:
    parser = ReplyParser(calls=PARSERS["hermes"](TOOLS, streams_arguments=True))

    events = parser.feed('<tool_call>{"name": "get_weather", "arguments": {"ci')

    assert [event.arguments for event in events if isinstance(event, ToolCallDelta)] == ["", '{"ci']


@pytest.mark.parametrize(
    ("schema", "written", "meant"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12", "12"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "12", 12),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[12]", [12]),
        ({"anyOf": [{"type": "string"}, {"enum": [12]}]}, "12", 12),
        ({"type": ["string", "number"]}, "12.5", 12.5),
        ({"type": "string", "anyOf": 5}, "12", "12"),
        ({"type": [["string"]]}, "12", 12),
        ({}, "12", 12),
    ],
    ids=str,
)
def test_a_value_without_quotes_has_a_type_that_its_schema_allows(schema: object, written: str, meant: object) -> None:
    tool = function("f", {"type": "object", "properties": {"x": schema}})
    text = f"<tool_call>\n<function=f>\n<parameter=x>\n{written}\n</parameter>\n</function>\n</tool_call>"

    (call,) = collect(read(PARSERS["qwen3_coder"]([tool]), [text])).tool_calls

    assert json.loads(call.arguments) == {"x": meant}


def test_ids_of_mistral_have_nine_characters_and_others_openais_form() -> None:
    short = collect(read(PARSERS["mistral_args"](TOOLS), ["[TOOL_CALLS]now[ARGS]{}"])).tool_calls[0].id
    long = collect(read(PARSERS["hermes"](TOOLS), ['<tool_call>{"name": "now"}</tool_call>'])).tool_calls[0].id

    assert re.fullmatch("[a-zA-Z0-9]{9}", short)
    assert re.fullmatch("call_[0-9a-f]{24}", long)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>no JSON</tool_call>"),
        ("hermes", '<tool_call>{"name": "now", "arguments": {bad}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "cut off'),
        ("hermes", '<tool_call>{"name": "now", "arguments": ' + "[" * 100_000),
        ("llama3_json", "<|python_tag|>print(5)"),
        ("pythonic", "<|python_start|>[now(1)]"),
        ("pythonic", "<|python_start|>[now(a=__import__('os'))]"),
        ("mistral", "[TOOL_CALLS]{}"),
        ("deepseek", "<｜tool▁calls▁begin｜>nothing"),
        ("qwen3_coder", "<tool_call><function=now><parameter=a>1</function></tool_call>"),
        ("glm4_moe", "<tool_call>now<arg_key>a</tool_call>"),
        ("harmony", "<|channel|>commentary to=functions.now<|message|>now"),
        ("nemotron", '<TOOLCALL>[{"name": "rm"}]</TOOLCALL>'),
        ("internlm", "<|action_start|><|interpreter|>\nprint(5)<|action_end|>"),
        ("functionary", "<function=now>no JSON</function>"),
        ("seed_oss", "<seed:tool_call><function=now><parameter=a>1</seed:tool_call>"),
        ("olmo3", "<function_calls>\nnow(1)\n</function_calls>"),
    ],
)
def test_a_call_that_does_not_parse_is_content_with_a_warning(name: str, text: str) -> None:
    parser = PARSERS[name](TOOLS)

    reply = collect(read(parser, [text]))

    assert reply.tool_calls == ()
    assert reply.content == text
    assert len(parser.warnings) == 1
    assert "is passed on as content" in parser.warnings[0]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": "{\\"a\\": \\"\\ud83d\\"}", "name": "now"}</tool_call>'),
        ("pythonic", '[now(a="\\ud83d")]'),
        ("pythonic", '[now(a="\\ud83d\\ude00")]'),
    ],
)
def test_half_of_a_surrogate_pair_in_arguments_leaves_texts_that_can_be_sent(
    name: str, text: str, streams: bool
) -> None:
    reply = collect(read(PARSERS[name](TOOLS, streams_arguments=streams), [text]))

    (reply.content + "".join(call.arguments for call in reply.tool_calls)).encode()
    if name == "pythonic":
        assert json.loads(reply.tool_calls[0].arguments)["a"] in ("\ud83d", "😀")
    else:
        assert text.endswith(reply.content)
        assert reply.content


def test_a_reply_of_broken_calls_has_few_warnings() -> None:
    parser = PARSERS["hermes"](TOOLS)

    read(parser, [f'<tool_call>{{"name": "rm{number}"}}' for number in range(1000)])

    assert len(parser.warnings) == MAX_WARNINGS


def test_a_whole_call_behind_a_broken_one_is_a_call() -> None:
    parser = PARSERS["hermes"](TOOLS)

    reply = collect(read(parser, ['<tool_call>{"name": "rm"}</tool_call>\n<tool_call>{"name": "now"}</tool_call>']))

    assert reply.content == '<tool_call>{"name": "rm"}</tool_call>'
    assert [call.name for call in reply.tool_calls] == ["now"]


@pytest.mark.parametrize("end", ["", "<", "</tool_cal", "</tool_call>"])
def test_what_a_cut_reply_has_of_the_mark_behind_a_call_is_no_content(end: str) -> None:
    parser = PARSERS["hermes"](TOOLS)

    reply = collect(read(parser, list('<tool_call>{"name": "now", "arguments": {}}\n' + end)))

    assert [call.name for call in reply.tool_calls] == ["now"]
    assert reply.content == ""


def test_calls_beyond_the_allowed_number_are_content() -> None:
    parser = PARSERS["hermes"](TOOLS, max_calls=1)
    call = '<tool_call>{"name": "now"}</tool_call>'

    reply = collect(read(parser, [call + call]))

    assert [call.name for call in reply.tool_calls] == ["now"]
    assert reply.content == call
    assert len(parser.warnings) == 1


def test_content_beside_calls_keeps_the_white_space_inside_it() -> None:
    parser = PARSERS["hermes"](TOOLS)

    events = read(parser, ['\nHi.\n<tool_call>{"name": "now"}</tool_call>\nBye. \n'])

    assert [event for event in events if isinstance(event, TextDelta)] == [TextDelta("\nHi."), TextDelta("\n\nBye.")]


def test_a_long_reply_takes_time_in_proportion_to_its_length() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "' + "<\\\\ " * 50_000 + '"}}</tool_call>'

    reply = collect(read(PARSERS["hermes"](TOOLS), [text[at : at + 50] for at in range(0, len(text), 50)]))

    assert len(json.loads(reply.tool_calls[0].arguments)["city"]) == 150_000


@pytest.mark.parametrize(
    ("sign", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("<tool_call><function=f><parameter=a>", "qwen3_coder"),
        ("<tool_call><arg_key>", "glm4_moe"),
        ("[TOOL_CALLS][", "mistral"),
        ("[TOOL_CALLS]f[ARGS]", "mistral_args"),
        ("<｜tool▁calls▁begin｜>```json", "deepseek"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<|channel|>final<|message|>", "harmony"),
        ("<|python_tag|>", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("<|observation|>", "chatglm"),
        ("<|tool_calls_section_begin|>", "kimi"),
        ("only with <|tool_call|> followed by a JSON list", "granite"),
        ("List of tools: [{{ '<|im_start|>' }}", "lfm2"),
        ("<|tool_call_start|>[", "lfm2"),
        ("<TOOLCALL>[", "nemotron"),
        ("<tool_calls>[", "tool_calls"),
        ("<|action_start|><|plugin|>", "internlm"),
        ("system name=<|plugin|>", "internlm"),
        ("<|START_ACTION|>", "command"),
        ("<|tool_call|>{<|/tool_call|>", "phi4_mini"),
        ("<|tool|>{{ tool }}<|/tool|>", "phi4_mini"),
        ("formatted as functools[{", "functools"),
        ("calls in a single JSON array: [{'name': 'tool_call_name'", "xlam"),
        ('<function=example_function_name>{"example_name"', "functionary"),
        (">>>${recipient}\\n${content}", "functionary_32"),
        ("<seed:tool_call><function=f><parameter=a>", "seed_oss"),
        ('<minimax:tool_call><invoke name="', "minimax_m2"),
        ("<functions><function_calls>", "olmo3"),
    ],
)
def test_the_format_is_chosen_from_the_template(sign: str, name: str) -> None:
    assert find_parser(f"a{sign}b") is PARSERS[name]


@pytest.mark.parametrize("name", sorted(PARSERS))
@given(arguments=ARGUMENTS)
@settings(max_examples=30, deadline=None)
def test_calls_that_a_format_writes_are_read_again(name: str, arguments: dict[str, object]) -> None:
    calls = [("get_weather", json.dumps(arguments)), ("now", "{}")][: 1 if name == "harmony" else 2]

    pieces = PARSERS[name].write(calls)

    assert pieces is not None
    reply = collect(read(PARSERS[name](TOOLS), ["".join(pieces)]))
    read_again = [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]
    assert read_again == [("get_weather", arguments), ("now", {})][: len(calls)]


def test_a_template_without_a_sign_has_no_format() -> None:
    assert find_parser("{{ messages }}") is None


@pytest.mark.parametrize(
    ("parser", "text", "said"),
    [
        ("hermes", "Well: <tool", "cut in '<tool'"),
        ("llama3_json", '{"name": "get_w', "looks like a tool call"),
        ("hermes", '<tool_call>{"name": "get_w', "looks like a tool call"),
    ],
)
def test_what_a_cut_leaves_of_a_call_is_content_with_a_warning(parser: str, text: str, said: str) -> None:
    cut, ended = (ReplyParser(calls=PARSERS[parser](TOOLS)) for _ in range(2))

    replies = [collect(each.feed(text) + each.finish(is_cut=is_cut)) for each, is_cut in ((cut, True), (ended, False))]

    assert [reply.content for reply in replies] == [text, text]
    (warning,) = cut.warnings
    assert said in warning
    assert not any("cut in" in line for line in ended.warnings)


def test_what_a_cut_leaves_of_the_mark_before_reasoning_is_content_with_a_warning() -> None:
    parser = ReplyParser(marks=("<think>", "</think>"))

    reply = collect(parser.feed("<thi") + parser.finish(is_cut=True))

    assert (reply.content, reply.reasoning) == ("<thi", "")
    assert parser.warnings == ["the reply was cut in '<thi', which may begin its reasoning: it is content"]

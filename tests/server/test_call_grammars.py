"""Calls of tools in each format: what the grammar writes obeys the schema and is read again by the format's parser."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import pytest

from brlite.chat.tool_calls import PARSERS, harmony
from brlite.chat.tools import Tool, ToolChoice, collect
from brlite.config.options import GrammarConfig
from brlite.errors import InvalidRequest
from brlite.grammar.compiler import GrammarCompiler
from brlite.grammar.matcher import Grammar
from brlite.sampling_params import Calls, Reasoning, StructuredOutput
from brlite.server.chat_replies import call_grammar
from tests.chat.replies import function, joined, read
from tests.grammar.answers import write
from tests.grammar.marked_tokens import MarkedTokens

WEATHER = function(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "is_long": {"type": "boolean"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
            "note": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
            "mark": {"enum": ["</parameter></arg_value>", 1]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        },
        "required": ["city", "code"],
        "additionalProperties": False,
        "$defs": {"tag": {"type": "string", "maxLength": 2}},
    },
)
NOW = Tool(name="now")
TOOLS = (WEATHER, NOW)
SCHEMAS = {"get_weather": WEATHER.schema(), "now": {"type": "object", "additionalProperties": False}}
VALIDATORS = {name: jsonschema.Draft202012Validator(schema) for name, schema in SCHEMAS.items()}
MARKS = sorted({mark for parser in PARSERS.values() for mark in parser.marks})
THINK = Reasoning(begins=("<think>",), end="</think>")
HARMONY = Reasoning(begins=harmony.PREAMBLES, end=harmony.PREAMBLE_END, answer_begin=harmony.FINAL)

TOKENIZERS = {
    "marks are text": MarkedTokens(()),
    "marks are tokens": MarkedTokens([*MARKS, "<think>", "</think>"]),
    "reasoning marks are text": MarkedTokens(MARKS),
}
each_vocabulary = pytest.mark.parametrize("vocabulary", TOKENIZERS)


def calls(name: str, mode: Literal["auto", "required"], *, parallel: bool = True) -> Calls:
    found = call_grammar(PARSERS[name], TOOLS, ToolChoice(mode=mode, parallel=parallel))
    assert found is not None
    return found


def compiled(vocabulary: str, **wish: Any) -> Grammar:
    tokenizer = TOKENIZERS[vocabulary]
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, GrammarConfig()).compile(StructuredOutput(**wish))  # type: ignore[arg-type]


def num_taken(grammar: Grammar, vocabulary: str, text: str) -> int:
    """How many tokens of a text the grammar takes."""
    matcher, tokenizer = grammar.matcher(), TOKENIZERS[vocabulary]
    token_ids = tokenizer.encode_marked(text)
    for number, token_id in enumerate(token_ids):
        words = bytearray(-(-tokenizer.vocab_size // 32) * 4)
        matcher.fill_masks(memoryview(words), ())
        if matcher.is_complete or not words[token_id // 8] >> token_id % 8 & 1:
            return number
        matcher.advance([token_id])
    return len(token_ids)


def takes(grammar: Grammar, vocabulary: str, text: str) -> bool:
    return num_taken(grammar, vocabulary, text) == len(TOKENIZERS[vocabulary].encode_marked(text))


def call_text(name: str) -> str:
    """A call of `now` in this format."""
    grammar = PARSERS[name].grammar(NOW)
    assert grammar is not None
    arguments = "{}" if grammar.parameters is None else ""
    return grammar.opening + grammar.begin + arguments + grammar.end + grammar.closing


@pytest.mark.parametrize(
    ("vocabulary", "parallel"), [*((each, True) for each in TOKENIZERS), ("marks are tokens", False)]
)
@pytest.mark.parametrize("name", PARSERS)
def test_forced_calls_obey_their_schemas_and_are_read_again(name: str, parallel: bool, vocabulary: str) -> None:
    grammar = compiled(vocabulary, calls=calls(name, "required", parallel=parallel))
    num_calls = 0

    for seed in range(8):
        written = write(grammar, TOKENIZERS[vocabulary], temperature=0.7, seed=seed, max_tokens=1200)
        if not written.is_ended:
            continue
        parser = PARSERS[name](TOOLS, streams_arguments=True)
        events = read(parser, [written.text])
        reply = collect(events)
        assert reply.content == "", written.text
        assert parser.warnings == []
        assert len(reply.tool_calls) >= 1
        assert parallel or len(reply.tool_calls) == 1
        for call in reply.tool_calls:
            VALIDATORS[call.name].validate(json.loads(call.arguments))
        assert joined(read(PARSERS[name](TOOLS, streams_arguments=True), list(written.text))) == joined(events)
        num_calls += len(reply.tool_calls)

    assert num_calls > 2


@each_vocabulary
@pytest.mark.parametrize("name", sorted(set(PARSERS) - {"harmony"}))
def test_with_auto_text_is_free_until_a_call_begins(name: str, vocabulary: str) -> None:
    grammar = compiled(vocabulary, calls=calls(name, "auto"))
    trigger = PARSERS[name].grammar(NOW).trigger  # type: ignore[union-attr]
    call = call_text(name)

    for text in ("", "Hello [1] {2} <b", '{"answer": [1]}', "[1, 2]\n", "now and then", call):
        assert takes(grammar, vocabulary, text), text
    if trigger:
        opening = call if call.startswith(trigger) else trigger + call
        assert takes(grammar, vocabulary, f"I look.{opening}")
        assert not takes(grammar, vocabulary, f"I look.{opening.replace('now', 'rm')}")
        assert not takes(grammar, vocabulary, trigger + "x" * 20)


@each_vocabulary
@pytest.mark.parametrize("name", PARSERS)
def test_without_parallel_calls_an_answer_ends_behind_its_call(name: str, vocabulary: str) -> None:
    grammar = compiled(
        vocabulary, calls=calls(name, "auto", parallel=False), reasoning=HARMONY if name == "harmony" else None
    )

    matcher = grammar.matcher()
    matcher.advance(TOKENIZERS[vocabulary].encode_marked(call_text(name)))

    assert matcher.error is None
    assert matcher.is_complete


SCHEMA = (
    '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}'
)
ANSWERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "schema": ({"json_schema": SCHEMA}, '{"a":true}', '{"b"'),
    "regex": ({"regex": "[0-9]{3}"}, "123", "a"),
    "choice": ({"choice": ("left", "right")}, "left", "up"),
    "grammar": ({"grammar": 'start: "x" | "y"'}, "x", "z"),
    "gbnf": ({"grammar": 'root ::= "x" | "y"'}, "x", "z"),
    "forced calls": ({"calls": calls("hermes", "required")}, call_text("hermes"), "I"),
    "structural tag": (
        {
            "structural_tag": {
                "structures": [{"begin": "<f=a>", "schema": True, "end": "</f>"}],
                "triggers": ["<f="],
            }
        },
        "text <f=a>1</f> text",
        "text <f=b",
    ),
}


@each_vocabulary
@pytest.mark.parametrize("begins_inside", [False, True])
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_grammar_begins_behind_the_reasoning(kind: str, begins_inside: bool, vocabulary: str) -> None:
    wish, good, bad = ANSWERS[kind]
    reasoning = Reasoning(begins=("<think>",), end="</think>", begins_inside=begins_inside)
    grammar = compiled(vocabulary, **wish, reasoning=reasoning)
    thought = f'{"" if begins_inside else "<think>"}\nIs it {bad}? "1234" {{ < </thi\n</think>'

    for spaces in ("", "\n\n"):
        assert takes(grammar, vocabulary, thought + spaces + good)
        assert not takes(grammar, vocabulary, thought + spaces + bad)
    assert begins_inside or takes(grammar, vocabulary, good)
    assert takes(grammar, vocabulary, bad) == begins_inside


@each_vocabulary
def test_an_answer_does_not_end_inside_the_reasoning(vocabulary: str) -> None:
    tokenizer = TOKENIZERS[vocabulary]
    grammar = compiled(vocabulary, regex="[0-9]{3}", reasoning=THINK)

    written = [write(grammar, tokenizer, temperature=1.5, seed=seed) for seed in range(20)]

    for each in written:
        assert not each.is_ended or each.text.split("</think>")[-1].strip().isdigit()


@each_vocabulary
def test_what_looks_like_a_call_inside_the_reasoning_is_none(vocabulary: str) -> None:
    grammar = compiled(vocabulary, calls=calls("hermes", "auto"), reasoning=THINK)
    inside = "" if vocabulary != "marks are text" else "<tool_call>\nno call"
    text = f"<think>Shall I?{inside}</think>\n\nYes.\n<tool_call>\n"

    assert takes(grammar, vocabulary, text + '{"name": "now"')
    assert not takes(grammar, vocabulary, text + '{"name": "rm"')
    assert takes(grammar, vocabulary, "No reasoning.")
    assert takes(grammar, vocabulary, call_text("hermes"))


@each_vocabulary
def test_a_leading_call_may_follow_the_reasoning(vocabulary: str) -> None:
    grammar = compiled(vocabulary, calls=calls("llama3_json", "auto"), reasoning=THINK)

    for thought in ("", "<think>x</think>\n"):
        assert takes(grammar, vocabulary, thought + call_text("llama3_json"))
        assert takes(grammar, vocabulary, f'{thought}{{"answer": 1}}')
        assert not takes(grammar, vocabulary, f'{thought}{{"name": "now", "parameters": [')


@each_vocabulary
def test_an_answer_with_a_schema_may_be_a_call(vocabulary: str) -> None:
    grammar = compiled(vocabulary, json_schema=SCHEMA, calls=calls("hermes", "auto"), reasoning=THINK)

    for thought in ("", "<think>x</think>\n\n"):
        assert takes(grammar, vocabulary, thought + '{"a":true}')
        assert takes(grammar, vocabulary, thought + call_text("hermes"))
        assert not takes(grammar, vocabulary, thought + "I look.")


@each_vocabulary
def test_harmony_has_messages_before_a_call_or_an_answer(vocabulary: str) -> None:
    auto = compiled(vocabulary, calls=calls("harmony", "auto"), reasoning=HARMONY)
    forced = compiled(vocabulary, calls=calls("harmony", "required"), reasoning=HARMONY)
    answer = compiled(vocabulary, json_schema=SCHEMA, reasoning=HARMONY)
    thought = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>"

    for before in ("", thought, thought * 2):
        assert takes(auto, vocabulary, f"{before}{final}Hi there.")
        assert takes(auto, vocabulary, before + call_text("harmony"))
        assert takes(forced, vocabulary, before + call_text("harmony"))
        assert not takes(forced, vocabulary, before + final)
        assert takes(answer, vocabulary, f'{before}{final}{{"a":true}}')
        assert not takes(answer, vocabulary, f"{before}{final}Hi")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "#/properties/a/not"),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "#/properties/a/uniqueItems"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, "#/properties/a"),
    ],
)
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_a_schema_that_cannot_be_enforced_is_refused_with_tool_and_place(name: str, schema: Any, place: str) -> None:
    found = call_grammar(PARSERS[name], (NOW, function("f", schema)), ToolChoice(mode="required"))

    with pytest.raises(InvalidRequest, match=f"f: at {place}"):
        compiled("marks are text", calls=found)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"anyOf": [{"type": "object"}]}, "#/anyOf"),
        ({"type": "object", "properties": {"a b>": {}}}, "cannot contain the name"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "b"}}}, "#/properties/a/pattern"),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "uri"}}}, "#/properties/a/format"),
        ({"type": "object", "properties": {"a": {"type": "string", "enum": ["b"], "minLength": 2}}}, "no text matches"),
        ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}}, "#/properties/a: "),
        (
            {"type": "object", "properties": {"a": {"type": "string", "allOf": [{"pattern": "^b$"}]}}},
            "#/properties/a/allOf",
        ),
    ],
)
def test_what_a_format_without_json_cannot_enforce_is_refused(schema: Any, reason: str) -> None:
    found = call_grammar(PARSERS["qwen3_coder"], (function("f", schema),), ToolChoice(mode="required"))

    with pytest.raises(InvalidRequest, match=f"f: at .*{reason}"):
        compiled("marks are text", calls=found)


@pytest.mark.parametrize(
    ("schema", "text", "is_taken"),
    [
        ({"enum": ["a", "abc"], "maxLength": 2}, "a", True),
        ({"enum": ["a", "abc"], "maxLength": 2}, "abc", False),
        ({"enum": ["a", "abc"], "pattern": "^ab?c?$", "minLength": 2}, "abc", True),
        ({"enum": ["2024-01-31", "x"], "format": "date"}, "x", False),
        ({"enum": ["a", "b"], "const": "a"}, "a", True),
        ({"enum": ["a", "b"], "const": "a"}, "b", False),
        ({"pattern": "^$"}, "", True),
        ({"pattern": "^$"}, "a", False),
    ],
    ids=str,
)
def test_a_text_without_quotes_obeys_all_its_keywords(schema: dict[str, Any], text: str, is_taken: bool) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", **schema}}, "required": ["a"]}
    found = call_grammar(PARSERS["qwen3_coder"], (function("f", parameters),), ToolChoice(mode="required"))
    call = f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"

    assert takes(compiled("marks are text", calls=found), "marks are text", call) == is_taken


@pytest.mark.parametrize(
    ("date", "is_taken"), [("2024-01-31", True), ("2024-04-31", False), ("2024-02-29", True), ("2023-02-29", False)]
)
def test_dates_without_quotes_are_those_that_exist(date: str, is_taken: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}, "required": ["a"]}
    found = call_grammar(PARSERS["qwen3_coder"], (function("f", schema),), ToolChoice(mode="required"))
    call = f"<tool_call>\n<function=f>\n<parameter=a>\n{date}\n</parameter>\n</function>\n</tool_call>"

    assert takes(compiled("marks are text", calls=found), "marks are text", call) == is_taken


def test_digits_of_a_call_come_to_an_end_and_those_of_text_do_not() -> None:
    tool = function("f", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    found = call_grammar(PARSERS["hermes"], (tool,), ToolChoice(mode="auto"))
    grammar = compiled("marks are text", calls=found, reasoning=THINK)
    before = '<think>"1" and "</think>' + "7" * 60 + '<tool_call>\n{"name": "f", "arguments": {"n":'

    assert takes(grammar, "marks are text", before + "7" * 20 + "}")
    assert not takes(grammar, "marks are text", before + "7" * 21)


OPEN: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("parameters", "takes_others"),
    [
        (None, False),
        ({}, False),
        ({"type": "object", "properties": {}}, False),
        (OPEN, False),
        ({**OPEN, "required": ["city"]}, False),
        ({**OPEN, "additionalProperties": True}, True),
        ({**OPEN, "patternProperties": {"^x-": {}}}, True),
        ({**OPEN, "required": ["days"]}, True),
        ({"type": "object"}, True),
    ],
    ids=lambda value: json.dumps(value)[40:90] if isinstance(value, dict) else "",
)
def test_a_call_has_no_arguments_but_those_that_the_function_names(
    parameters: dict[str, Any] | None, takes_others: bool
) -> None:
    tool = function("weather", parameters)
    found = call_grammar(PARSERS["hermes"], [tool], ToolChoice(mode="required"))
    call = '<tool_call>\n{"name": "weather", "arguments": {"days":2}}\n</tool_call>'

    grammar = compiled("marks are text", calls=found)

    assert takes(grammar, "marks are text", call) == takes_others


@pytest.mark.parametrize("required", [[[]], [{}], [None], "city"])
def test_required_names_that_are_no_texts_are_refused(required: Any) -> None:
    found = call_grammar(
        PARSERS["hermes"], [function("f", {**OPEN, "required": required})], ToolChoice(mode="required")
    )

    with pytest.raises(InvalidRequest, match="required"):
        compiled("marks are text", calls=found)

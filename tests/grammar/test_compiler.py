"""Expressions, choices, grammars and structural tags; what is refused, and where; the cache."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from brlite.config.options import GrammarConfig
from brlite.errors import InvalidRequest
from brlite.grammar.compiler import GrammarCompiler, deep_stack
from brlite.grammar.library import MAX_ENCODED
from brlite.sampling_params import StructuredOutput
from tests.fakes import EOS
from tests.grammar.answers import LongTokens, write
from tests.limits import PATIENCE_SECONDS

TOKENIZER = LongTokens()
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, GrammarConfig())


def texts(seeds: int = 8, **wish: Any) -> list[str]:
    grammar = COMPILER.compile(StructuredOutput(**wish))
    written = [write(grammar, TOKENIZER, temperature=1.5, seed=seed) for seed in range(seeds)]
    return [each.text for each in written if each.is_ended]


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{3}-\d{2}",
        r"(\d{1,3}\.){3}\d{1,3}",
        r"^yes|no$",
        r"a?b{2,4}c*",
        r"[^x]y",
        r"(foo|ba(r|z)){1,3}",
        r"\n\t?",
    ],
)
def test_a_whole_answer_matches_its_expression(regex: str):
    found = texts(regex=regex)

    assert found
    assert all(re.fullmatch(regex.strip("^$"), text) for text in found)


def test_an_answer_is_one_of_the_choices():
    choices = (
        "yes",
        "no",
        "may.be (x|y)",
        "a+b",
        "[1]",
        "über",
        "new\nline",
        "back\\slash",
        "yes, but",
        "{}",
        "&~#/ -",
    )

    found = texts(seeds=60, choice=choices)

    assert set(found) <= set(choices)
    assert len(set(found)) > 5


def test_many_choices_are_taken():
    choices = tuple(f"choice number {number * 7919}" for number in range(5000))

    assert set(texts(choice=choices)) <= set(choices)


@pytest.mark.parametrize(
    ("grammar", "regex"),
    [
        ('root ::= "a" [0-9]{1,3} tail\ntail ::= "z" | "y" tail', r"a\d{1,3}y*z"),
        ('root ::= ("ab" | "c")+ # a comment ::= here', r"(ab|c)+"),
        ('start: "a" NUMBER "z"\nNUMBER: /[0-9]+/\n', r"a\d+z"),
        ('start: item ("," item)*\nitem: "x" | "(" item ")"\n', r"[x(),]+"),
        ('?start: sum\n?sum: N | sum "+" N\nN: /[0-9]/\n', r"\d(\+\d)*"),
    ],
)
def test_grammars_of_both_notations(grammar: str, regex: str):
    found = texts(grammar=grammar)

    assert found
    assert all(re.fullmatch(regex, text) for text in found)


def test_a_structural_tag_leaves_text_free_and_bounds_what_is_inside():
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<f=a>", "schema": schema, "end": "</f>"}],
        "triggers": ["<f="],
    }
    grammar = COMPILER.compile(StructuredOutput(structural_tag=tag))

    matcher = grammar.matcher()
    matcher.advance(list(b"a < b, so <f="))
    assert TOKENIZER.decode(list(matcher.forced)).startswith('a>{"')
    matcher.advance(list(b'a>{"x":1}</f> and so on'))

    assert matcher.error is None
    assert not matcher.is_complete
    matcher.advance(list(b"<f=a>["))
    assert matcher.error is not None


SCHEMA_REFUSALS: list[tuple[Any, str, str]] = [
    (
        {"type": "object", "properties": {"a": {"properties": {"b": {"not": {}}}}}},
        "#/properties/a/properties/b/not",
        "not",
    ),
    ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "#/items/uniqueItems", "uniqueItems"),
    ({"type": "object", "patternProperties": {"^x-": False}}, "#/patternProperties", "of no properties"),
    ({"patternProperties": {"^[&]$": {}, r"^[\&]$": {"type": "null"}}}, "#/patternProperties", "the same pattern"),
    ({"type": "number", "exclusiveMinimum": 3e14, "maximum": 3e14 + 0.5}, "#", "exclusiveMinimum"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0}, "#", "exclusiveMinimum"),
    ({"type": "integer", "exclusiveMinimum": 2**53}, "#/exclusiveMinimum", "not enforced exactly"),
    ({"type": "number", "minimum": 5, "exclusiveMaximum": 4}, "#", "exclusiveMaximum"),
    (
        {"items": {"$ref": "#/$defs/a/patternProperties/[[]"}, "$defs": {"a": {"patternProperties": {"[[]": {}}}}},
        "#/items/$ref",
        "to a pattern",
    ),
    ({"type": "number", "exclusiveMaximum": -(10**15), "minimum": -(10**15) - 0.5}, "#", "exclusiveMaximum"),
    ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "#/if", "if"),
    ({"type": "array", "contains": {"type": "integer"}}, "#/contains", "contains"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "#/dependentRequired", "dependentRequired"),
    ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, "#/dependentSchemas", "dependentSchemas"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "#/dependencies", "dependencies"),
    ({"allOf": [{}], "unevaluatedProperties": False}, "#/unevaluatedProperties", "unevaluatedProperties"),
    ({"type": "array", "unevaluatedItems": False}, "#/unevaluatedItems", "unevaluatedItems"),
    ({"propertyNames": {"maxLength": 3, "pattern": "a"}}, "#/propertyNames", "propertyNames"),
    ({"propertyNames": {"maxLength": 3, "minLength": 4}}, "#/propertyNames", "propertyNames"),
    ({"propertyNames": {"maxLength": 3}, "properties": {"a": {}}}, "#/propertyNames", "propertyNames"),
    ({"propertyNames": {"format": "email"}}, "#/propertyNames", "propertyNames"),
    ({"propertyNames": {"format": ["date"]}}, "#/propertyNames", "propertyNames"),
    ({"$dynamicRef": "#x"}, "#/$dynamicRef", "dynamicRef"),
    ({"anyOf": [{"type": "string", "pattern": "a(?=b)"}]}, "#/anyOf/0/pattern", "look-around"),
    ({"type": "string", "pattern": r"(a)\1"}, "#/pattern", "backreference"),
    ({"type": "string", "pattern": r"\bword"}, "#/pattern", "word boundary"),
    ({"properties": {"x/y": {"type": "string", "pattern": "a("}}}, "#/properties/x~1y", "unclosed group"),
    ({"patternProperties": {"[": {}}}, "#/patternProperties", "unclosed"),
    (
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}, "required": ["a"]},
        "#/properties/a",
        "minimum",
    ),
    ({"properties": {"a": {"type": "text"}}}, "#/properties/a/type", '"text" is not one of'),
    ({"properties": {"a": {"type": ["string", "any"]}}}, "#/properties/a/type", '"any" is not one of'),
    ({"properties": {"a": {"enum": []}}}, "#/properties/a/enum", "at least one value"),
    ({"properties": {"a": "string"}}, "#/properties/a", "a schema is an object"),
    ({"properties": ["a"]}, "#/properties", "an object of schemas"),
    ({"required": "a"}, "#/required", "list of names"),
    ({"properties": {"a": {"type": "string", "required": True}}}, "#/properties/a/required", "list of names"),
    ({"type": "string", "minLength": -1}, "#/minLength", "integer from 0"),
    ({"type": "string", "maxLength": "5"}, "#/maxLength", "integer from 0"),
    ({"type": "integer", "minimum": "5"}, "#/minimum", "a number"),
    ({"anyOf": {"type": "string"}}, "#/anyOf", "list of schemas"),
    ({"const": 2**53 + 1}, "#/const", "not enforced exactly"),
    ({"enum": [1, {"deep": [2**70]}]}, "#/enum", "not enforced exactly"),
    ({"const": 3.8062180036285414e-23}, "#/const", "not enforced exactly"),
    ({"enum": [0.5, 123456789.12345679]}, "#/enum", "not enforced exactly"),
    ({"type": "integer", "minimum": 2**60}, "#/minimum", "not enforced exactly"),
    ({"type": "integer", "minimum": 10**400}, "#/minimum", "not enforced exactly"),
    ({"type": "integer", "exclusiveMaximum": -(10**400)}, "#/exclusiveMaximum", "not enforced exactly"),
    ({"$ref": "#/$defs/missing"}, "#/$ref", "leads to nothing"),
    ({"$ref": "https://example.com/schema.json"}, "#/$ref", "nothing is fetched"),
    ({"$ref": 3}, "#/$ref", "a reference is a string"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf", "cannot be told apart"),
    ({"type": "object", "properties": {"a": {}}, "minProperties": 2}, "#", "Properties"),
    ({"$ref": "#"}, "#", "never ends"),
    ({"type": "object", "properties": {"me": {"$ref": "#"}}, "required": ["me"]}, "#", "never ends"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#", "never ends"),
    ({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "#", "never ends"),
    (
        {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}}},
        "#/",
        "never ends",
    ),
    ({"$id": "x", "type": "null", "anyOf": [{"$id": "x"}]}, "#/anyOf/0/$id", "same name"),
    ({"anyOf": [{"$id": ""}]}, "#/anyOf/0/$id", "same name"),
    ({"anyOf": [{"$anchor": "a"}, {"$anchor": "a"}]}, "#/anyOf/1/$anchor", "same name"),
    (False, "#", "allows nothing"),
    *(
        ({keyword: None}, f"#/{keyword}", "is a list of schemas")
        for keyword in ("anyOf", "oneOf", "allOf", "prefixItems")
    ),
]


@pytest.mark.parametrize(("schema", "pointer", "reason"), SCHEMA_REFUSALS, ids=lambda value: str(value)[:40])
def test_a_schema_that_is_not_enforced_is_refused_with_its_place(schema: Any, pointer: str, reason: str):
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.compile(StructuredOutput(json_schema=json.dumps(schema), param="response_format"))

    assert str(caught.value).startswith(f"response_format: at {pointer}")
    assert reason in str(caught.value)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": '{"const": NaN}'}, "NaN is not JSON"),
        ({"json_schema": '"string"'}, "a schema is an object"),
        ({"regex": "(?=a)b"}, "look-around at character 0"),
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(?P<x>a)(?P=x)"}, "backreference"),
        ({"regex": "a[^\\s\\S]"}, ""),
        ({"grammar": "hello"}, ""),
        ({"grammar": 'start: %json {"type": "object"}'}, "%json"),
        ({"grammar": ' {"grammars": [{"json_schema": {}}]}'}, "is JSON"),
        ({"grammar": "root ::= missing"}, "missing"),
        ({"grammar": "start: start\n"}, ""),
        ({"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}}, "structures"),
        ({"structural_tag": {"structures": [{"begin": "<a>", "end": ""}], "triggers": ["<b"]}}, "none of the triggers"),
        (
            {"structural_tag": {"structures": [{"begin": "a", "end": "", "schema": {"not": {}}}], "triggers": ["a"]}},
            "#/not",
        ),
        ({"json_object": True, "whitespace_pattern": "(?=a)"}, "whitespace_pattern uses look-around"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wish_that_cannot_be_compiled_is_refused_with_the_reason(wish: dict[str, Any], reason: str):
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.compile(StructuredOutput(**wish))

    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_nothing_refers_to_is_not_looked_at():
    schema = {"type": "null", "$defs": {"unused": {"not": {}, "if": True}}}

    assert texts(seeds=1, json_schema=schema) == ["null"]


@pytest.mark.parametrize(
    ("format_name", "text", "is_taken"),
    [
        ("date", "2021-02-29", False),
        ("date", "1900-02-29", False),
        ("date", "2000-02-29", True),
        ("date", "2024-02-29", True),
        ("date", "0000-01-01", False),
        ("date", "2021-01-31", True),
        ("date-time", "2021-01-31T10:00:60Z", False),
        ("date-time", "2021-02-29T10:00:00Z", False),
        ("date-time", "2021-01-31T10:00:59.5+02:00", True),
        ("time", "10:00:60Z", False),
        ("time", "10:00:59Z", True),
    ],
)
def test_dates_and_times_are_those_that_exist(format_name: str, text: str, is_taken: bool):
    assert takes({"type": "string", "format": format_name}, text) == is_taken


def takes(schema: Any, value: Any) -> bool:
    """Whether an answer by the schema may be this value, after which nothing follows."""
    matcher = COMPILER.compile(StructuredOutput(json_schema=json.dumps(schema))).matcher()
    matcher.advance([*json.dumps(value, separators=(",", ":")).encode()])
    return matcher.is_complete


def one(**bounds: Any) -> dict[str, Any]:
    """A list of one number: it has an end."""
    return {"type": "array", "items": {"type": "number", **bounds}, "minItems": 1, "maxItems": 1}


@pytest.mark.parametrize(
    ("schema", "value", "is_taken"),
    [
        ({"type": "string", "pattern": "^[[:alpha:]]$"}, "a", False),  # a class with "[" in it, and then "]"
        ({"type": "string", "pattern": "^[[:alpha:]]$"}, "a]", True),
        ({"type": "string", "pattern": r"^[^[\]]$"}, "a", True),
        ({"type": "string", "pattern": r"^[^[\]]$"}, "[", False),
        ({"type": "string", "pattern": "^[a&&b]$"}, "&", True),
        ({"type": "string", "pattern": "^[+--]$"}, ",", True),  # from "+" to "-"
        ({"type": "string", "pattern": "^[--a]$"}, "A", True),  # from "-" to "a"
        ({"type": "string", "pattern": "^[^--a]$"}, "A", False),
        ({"type": "string", "pattern": "^[--]$"}, "-", True),
        ({"type": "string", "pattern": "^[]~~&&]$"}, "&", True),
        ({"$ref": "#/$defs/Page[int]", "$defs": {"Page[int]": {"type": "null"}}}, None, True),
        ({"$ref": "#/$defs/a#b", "$defs": {"a#b": {"type": "null"}}}, None, True),
        (
            {
                "type": "object",
                "patternProperties": {"^[[]$": {}},
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
            {"[": 1},
            True,
        ),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "additionalItems": True, "maxItems": 1}, ["a"], False),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "additionalItems": False, "maxItems": 1}, [1], True),
        ({"type": "array", "items": [{"type": "integer"}], "additionalItems": False}, [1, 2], False),
        (one(exclusiveMinimum=0, maximum=0.5), [0], False),
        (one(exclusiveMinimum=0, maximum=0.5), [0.05], True),
        (one(exclusiveMinimum=-0.0, exclusiveMaximum=0.1), [0], False),
        (one(minimum=-0.5, exclusiveMaximum=0), [-0.0], False),
        (one(exclusiveMinimum=100, maximum=100.5), [100], False),
        (one(exclusiveMinimum=100, maximum=100.5), [100.01], True),
        (one(exclusiveMinimum=100000, maximum=100000.5), [100000], False),
        (one(exclusiveMinimum=1e6, maximum=1000000.5), [1000000], False),
        (one(exclusiveMinimum=1e6, maximum=1000000.5), [1000000.00000001], True),
        (one(allOf=[{"exclusiveMinimum": 10**9}, {"maximum": 10**9 + 0.5}]), [10**9], False),
        (one(exclusiveMaximum=-99999999999999, minimum=-99999999999999.5), [-99999999999999], False),
        (one(exclusiveMaximum=-99999999999999, minimum=-99999999999999.5), [-99999999999999.25], True),
        (one(exclusiveMinimum=2**53 - 2), [2**53 - 2], False),
        (one(minimum=2.0**53 - 1), [2**53 - 2], False),
        (one(minimum=2.0**53 - 1), [2**53 - 1], True),
        (one(maximum=-(2.0**53) + 1), [-(2**53) + 2], False),
        (one(minimum=0.9495297281924633), [0.9495297281924632], False),
        (one(minimum=-0.9574937368872283), [-0.9574937368872284], False),
        (one(maximum=0.9495297281924633), [0.949529728192463], True),
        (one(exclusiveMaximum=0.37866462069949036, minimum=0), [0.37866462069949036], False),
        (one(minimum=1e-300), [0.5], True),
        (one(minimum=1e-300), [0], False),
        (one(minimum=-1e-300), [0], True),
        (one(maximum=-1e-300), [0], False),
        (one(minimum=0, maximum=1e-300), [0], True),
        (one(exclusiveMinimum=2.0**53 - 2), [2**53 - 1], True),
        (one(exclusiveMinimum=3, exclusiveMaximum=4), [4], False),
        (one(exclusiveMinimum=-1, exclusiveMaximum=1), [0], True),
        (one(exclusiveMinimum=0.5, maximum=0.75), [0.5], False),
        (one(exclusiveMinimum=0, minimum=3), [2], False),
    ],
    ids=str,
)
def test_a_schema_means_what_json_schema_says(schema: Any, value: Any, is_taken: bool):
    assert takes(schema, value) == is_taken


def test_rewritten_patterns_match_only_what_the_originals_match():
    originals = [
        r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
        r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d{0,2}0*$",
        r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*$)",
        r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,5}|(?=[\d.]{1,6}0*$)\d*\.\d*0*$)",
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    ]

    for pattern in originals:
        found = texts(seeds=30, json_schema={"type": "string", "pattern": pattern})
        assert len(found) > 20
        assert all(re.search(pattern, json.loads(text)) for text in found)


def test_a_grammar_is_compiled_once_and_a_refusal_is_kept_too(monkeypatch: pytest.MonkeyPatch):
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, GrammarConfig())
    first = compiler.compile(StructuredOutput(regex="abc"))
    with pytest.raises(InvalidRequest):
        compiler.compile(StructuredOutput(regex="a("))
    assert compiler._library is not None
    monkeypatch.setattr(compiler._library, "compile", None)

    assert compiler.compile(StructuredOutput(regex="abc", param="guided_regex")) is first
    with pytest.raises(InvalidRequest, match=r"^guided_regex: "):
        compiler.compile(StructuredOutput(regex="a(", param="guided_regex"))


def test_a_prepared_compiler_does_not_read_the_vocabulary_again(monkeypatch: pytest.MonkeyPatch):
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, GrammarConfig())

    compiler.prepare()
    monkeypatch.setattr("brlite.grammar.library.Library", None)
    grammar = compiler.compile(StructuredOutput(choice=("yes", "no")))

    assert write(grammar, TOKENIZER, temperature=1.0, seed=0).text in ("yes", "no")


def test_the_cache_is_bounded_in_bytes():
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, GrammarConfig(cache_bytes=1024**2))

    for number in range(100):
        compiler.compile(StructuredOutput(regex=f"abc{number}"))
        assert compiler._cached_bytes <= 1024**2

    assert 2 < len(compiler._cache) < 20


def test_compiling_on_a_thread_leaves_the_stacks_of_others_alone():
    import threading

    before = threading.stack_size()

    grammar = COMPILER.compile_on_thread(StructuredOutput(regex="on a thread"))

    assert grammar is not None
    assert threading.stack_size() == before
    with deep_stack():
        assert threading.stack_size() > before


def test_a_whitespace_pattern_counts_to_the_bytes_of_a_wish():
    wish = StructuredOutput(json_object=True, whitespace_pattern=" " * 300_000)

    with pytest.raises(InvalidRequest, match="300000 characters are too many"):
        COMPILER.compile(wish)


def test_a_draft_token_that_ends_the_answer_may_be_followed_by_any_others():
    """Each of them may be drawn, and is dropped: prompts repeat what stands between their turns, and so do drafts."""
    matcher = COMPILER.compile(StructuredOutput(regex="ab?")).matcher()
    matcher.advance([ord("a")])
    row_bytes = -(-TOKENIZER.vocab_size // 32) * 4
    words = memoryview(bytearray(4 * row_bytes))

    matcher.fill_masks(words, [EOS, ord("\n"), ord("x")])

    rows = [words[row * row_bytes : (row + 1) * row_bytes] for row in range(4)]
    assert any(rows[0])
    assert rows[1:] == [b"\xff" * row_bytes] * 3


class EndlessTokens(LongTokens):
    eos_token_ids = ()


def test_a_vocabulary_without_an_end_of_text_ends_an_answer_where_nothing_can_follow():
    tokenizer = EndlessTokens()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, GrammarConfig())
    compiler.prepare()

    written = [
        write(compiler.compile(wish), tokenizer, temperature=1.0, seed=3, max_tokens=40)
        for wish in (StructuredOutput(regex="[ab]{4}c"), StructuredOutput(regex="[ab]+"))
    ]

    assert [each.is_ended for each in written] == [True, False]
    assert re.fullmatch("[ab]{4}c", written[0].text)
    assert re.fullmatch("[ab]{40,}", written[1].text)


def test_expressions_side_by_side_do_not_force_tokens_without_end():
    code = (
        "from tests.grammar import test_compiler as t;"
        "g = t.COMPILER.compile(t.StructuredOutput(grammar='start: /a+/ /a+/'));"
        "assert t.write(g, t.TOKENIZER, temperature=1.0, seed=1, max_tokens=9).text == 'a' * 9"
    )

    process = subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_SECONDS, check=False)

    assert process.returncode == 0

    with pytest.raises(InvalidRequest, match="sets options of llguidance"):
        COMPILER.compile(StructuredOutput(grammar='%llguidance {"no_forcing": false}\nstart: /a+/ /a+/'))
    assert texts(grammar='%llguidance {}\nstart: "a"') == ["a"] * 8


class CountingTokens(LongTokens):
    """Keeps the length of the longest text that was encoded."""

    longest = 0

    def encode_continuation(self, text: str) -> list[int]:
        self.longest = max(self.longest, len(text))
        return super().encode_continuation(text)


def test_of_a_long_forced_text_only_the_beginning_is_encoded_at_once():
    tokenizer = CountingTokens()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, GrammarConfig())
    text = "the answer to it all, " * 1000

    matcher = compiler.compile(StructuredOutput(json_schema=json.dumps({"const": text}))).matcher()
    token_ids = list[int]()
    while not matcher.is_complete:
        token_ids += matcher.forced
        matcher.advance(list(matcher.forced))

    assert json.loads(tokenizer.decode(token_ids)) == text
    assert tokenizer.longest <= MAX_ENCODED


@pytest.mark.parametrize(
    "wish",
    [
        StructuredOutput(choice=("the answer " * 5000,)),
        StructuredOutput(json_schema=json.dumps({"const": "the answer " * 5000})),
        StructuredOutput(grammar='root ::= "' + "the answer " * 5000 + '"'),
    ],
)
def test_tokens_of_a_very_long_text_are_masked_and_not_forced(wish: StructuredOutput):
    tokenizer = LongTokens()
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size, GrammarConfig()).compile(wish).matcher()
    words = bytearray(-(-tokenizer.vocab_size // 32) * 4)

    matcher.fill_masks(memoryview(words), ())

    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(words, np.uint8), bitorder="little"))
    assert list(matcher.forced) == []
    assert {tokenizer.token_text(int(token_id))[:1] for token_id in allowed} <= {"t", '"'}


def test_a_matcher_is_made_without_reading_the_texts_of_the_wish_again():
    grammar = COMPILER.compile(StructuredOutput(json_schema=json.dumps({"enum": ["the answer " * 1000, "no"]})))
    called = list[str]()

    sys.setprofile(lambda frame, event, function: called.append(getattr(function, "__name__", "")))
    try:
        grammar.matcher()
    finally:
        sys.setprofile(None)

    assert "deep_copy" in called
    assert "findall" not in called

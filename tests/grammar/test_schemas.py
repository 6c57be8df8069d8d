"""Each answer to a schema parses and is valid, whatever the model says, unless it is cut by length."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import validator_for

from brlite.config.options import GrammarConfig
from brlite.errors import InvalidRequest
from brlite.grammar.compiler import GrammarCompiler
from brlite.sampling_params import StructuredOutput
from tests.grammar.answers import LongTokens, write
from tests.grammar.schemas import SCHEMAS
from tests.rows import all_rows

TOKENIZER = LongTokens()
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, GrammarConfig())


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def check(schema: Any, text: str) -> None:
    validator = validator_for(schema, default=jsonschema.Draft202012Validator)
    value = json.loads(text, parse_constant=refuse)
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(value)


def test_there_are_schemas_of_every_kind():
    assert len({json.dumps(schema) for schema in SCHEMAS}) >= 250


def test_an_answer_is_valid_and_most_end_by_themselves():
    num_ended = 0

    with all_rows() as row:
        for schema in SCHEMAS:
            with row(schema):
                grammar = COMPILER.compile(StructuredOutput(json_schema=json.dumps(schema)))
                for temperature, seed in ((1.0, 0), (1.0, 1), (1.5, 0), (1.5, 1), (1.5, 7)):
                    written = write(grammar, TOKENIZER, temperature=temperature, seed=seed)
                    if written.is_ended:
                        check(schema, written.text)
                num_ended += written.is_ended

    assert num_ended >= 0.95 * len(SCHEMAS)


@pytest.mark.parametrize("schema", SCHEMAS[::11], ids=lambda schema: json.dumps(schema)[:60])
def test_whitespace_comes_only_where_it_is_asked_for(schema: Any):
    wish = StructuredOutput(json_schema=json.dumps(schema), whitespace_pattern=r"[ \n]{0,2}")
    grammar = COMPILER.compile(wish)

    for seed in range(3):
        written = write(grammar, TOKENIZER, temperature=1.5, seed=seed)
        if written.is_ended:
            check(schema, written.text)


def test_any_json_object_is_compact_and_parses():
    grammar = COMPILER.compile(StructuredOutput(json_object=True))

    texts = [write(grammar, TOKENIZER, temperature=1.5, seed=seed) for seed in range(30)]

    for written in texts:
        assert written.text.startswith("{")
        if written.is_ended:
            assert isinstance(json.loads(written.text, parse_constant=refuse), dict)


@pytest.mark.parametrize("schema", [{"type": "integer"}, {"type": "number"}, {}, {"type": "array", "items": {}}])
def test_a_number_does_not_go_on_for_ever(schema: Any):
    """With a model that says nothing but digits, and then nothing but points and exponents."""
    for wanted in ("7", "7.7e7"):
        matcher = COMPILER.compile(StructuredOutput(json_schema=json.dumps(schema))).matcher()
        text = "[" if schema.get("type") == "array" else ""
        matcher.advance([ord(text)] if text else [])
        for _ in range(100):
            words = memoryview(bytearray(-(-TOKENIZER.vocab_size // 32) * 4))
            matcher.fill_masks(words, ())
            allowed = [each for each in dict.fromkeys(wanted) if words.cast("i")[ord(each) // 32] >> ord(each) % 32 & 1]
            if not allowed:
                break
            text += next((each for each in "e." if each in allowed), "7")
            matcher.advance([ord(text[-1])])
        assert len(text) <= 50
        json.loads(text + ("]" if text.startswith("[") else ""))


@pytest.mark.parametrize(("text", "most"), [("1e", 2), ("1e-", 2), ("1E1", 1), ("1e-10", 0), ("1", 4), ('"1e', 4)])
def test_a_token_of_several_digits_does_not_make_an_exponent_too_long(text: str, most: int):
    """Else a number might be too large for any reader. Its `Infinity` is no JSON."""
    schema = {"type": ["number", "string"]}
    matcher = COMPILER.compile(StructuredOutput(json_schema=json.dumps(schema))).matcher()
    matcher.advance([*text.encode()])

    words = memoryview(bytearray(-(-TOKENIZER.vocab_size // 32) * 4))
    matcher.fill_masks(words, ())

    allowed = [id_ for id_ in range(TOKENIZER.vocab_size) if words[id_ // 8] >> id_ % 8 & 1]
    digits = [re.match(r"[-+]?([0-9]*)", TOKENIZER.token_text(token_id))[1] for token_id in allowed]  # type: ignore[index]
    assert max(map(len, digits)) == most


def test_keys_come_in_the_order_of_the_schema():
    names = ["zeta", "alpha", "mid", "beta"]
    schema = {"type": "object", "properties": {name: {"type": "boolean"} for name in names}, "required": names}
    grammar = COMPILER.compile(StructuredOutput(json_schema=schema | {"additionalProperties": False}))

    for seed in range(5):
        assert list(json.loads(write(grammar, TOKENIZER, temperature=1.5, seed=seed).text)) == names


def test_a_schema_cannot_loosen_the_whitespace_itself():
    schema = {"type": "array", "items": {"type": "null"}, "minItems": 2, "x-guidance": {"whitespace_flexible": True}}
    grammar = COMPILER.compile(StructuredOutput(json_schema=schema))

    for seed in range(10):
        assert " " not in write(grammar, TOKENIZER, temperature=1.5, seed=seed, max_tokens=20).text


def test_a_type_that_is_no_name_is_refused_where_alternatives_are_compared():
    """Found by the fuzzer: what has no hash ended the comparison of two alternatives."""
    schema = {"oneOf": [{"type": [{}], "enum": [1]}, {"type": ["integer"], "enum": [2]}]}

    with pytest.raises(InvalidRequest, match="type"):
        COMPILER.compile(StructuredOutput(json_schema=schema))

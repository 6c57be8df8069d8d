"""Whatever a schema, an expression or a grammar is, the outcome is a compiled grammar or a refusal of one line."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from hypothesis import strategies as st

from brlite.config.options import GrammarConfig
from brlite.errors import InvalidRequest
from brlite.grammar.compiler import GrammarCompiler
from brlite.sampling_params import StructuredOutput
from tests.fuzz.budget import fuzz
from tests.grammar.answers import LongTokens, write
from tests.grammar.test_schemas import check

TOKENIZER = LongTokens()
COMPILER = GrammarCompiler(
    TOKENIZER,
    TOKENIZER.vocab_size,
    GrammarConfig(max_repetitions=300, max_subschemas=300, max_rules=30, cache_bytes=1024**2),
)

names = st.sampled_from(["a", "b", "$ref", "x/y", "~", "é", ""])
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=6,
)
patterns = st.one_of(
    st.from_regex(r"\^?([ab.]|\[a-c\]|\\d)([*+?]|\{[0-9]{1,2}(,[0-9]{0,2})?\})?(\|b)?\$?", fullmatch=True),
    st.text("ab()[]{}^$|*+?\\.,19-<>!=", max_size=12),
)
references = st.sampled_from(
    ["#", "#/$defs/a", "#/$defs/b", "#/properties/a", "#/anyOf/0", "#a", "other", "#/%41", "#//"]
)
sizes = st.integers(-1, 4)
types = st.sampled_from(["null", "boolean", "object", "array", "number", "string", "integer", "text"])


def keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    lists, maps = st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.one_of(types, types, types, st.lists(types, max_size=2), values),
            "enum": st.lists(values, max_size=3),
            "const": values,
            "properties": maps,
            "patternProperties": st.dictionaries(patterns, inner, max_size=1),
            "required": st.lists(names, max_size=2),
            "additionalProperties": inner,
            "items": st.one_of(inner, inner, lists),
            "prefixItems": lists,
            "minItems": sizes,
            "maxItems": sizes,
            "minLength": sizes,
            "maxLength": sizes,
            "minProperties": sizes,
            "uniqueItems": st.booleans(),
            "pattern": patterns,
            "format": st.sampled_from(["date", "email", "path", "uuid"]),
            "minimum": st.integers(-5, 5),
            "exclusiveMaximum": st.one_of(st.integers(-5, 5), st.booleans()),
            "multipleOf": st.sampled_from([0, 1, 2, 0.5, -1]),
            "anyOf": lists,
            "allOf": lists,
            "oneOf": lists,
            "$ref": references,
            "$defs": st.fixed_dictionaries({}, optional={"a": inner, "b": inner}),
            "$id": st.sampled_from(["other", "https://example.com/x", "#a"]),
            "$anchor": st.just("a"),
            "not": inner,
            "if": inner,
            "propertyNames": inner,
            "unevaluatedProperties": inner,
            "title": st.text(max_size=3),
            "x-guidance": st.just({"whitespace_flexible": True}),
        },
    )


schemas = st.recursive(st.one_of(st.booleans(), keywords(st.booleans())), keywords, max_leaves=8)


def compile_or_refuse(**wish: Any) -> Any:
    refusal = ""
    try:
        return COMPILER.compile(StructuredOutput(**wish))
    except InvalidRequest as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) < 1000
    return None


def as_validated(schema: Any) -> Any:
    """Without what has no effect and what the validator reads all the same.

    That is an `if` without a `then` or an `else`, and draft 4's exclusiveMaximum without a maximum.
    """
    if isinstance(schema, list):
        return [as_validated(each) for each in schema]
    if isinstance(schema, dict):
        kept = {key: value for key, value in schema.items() if key != "if"}
        if isinstance(kept.get("exclusiveMaximum"), bool):
            del kept["exclusiveMaximum"]
        return {key: as_validated(value) for key, value in kept.items()}
    return schema


@fuzz(st.tuples(schemas, st.integers(0, 3)), examples=100)  # a schema is compiled, and written: 0.1 s
def test_a_schema_is_refused_or_its_answers_are_valid(case: tuple[Any, int]) -> None:
    schema, seed = case
    grammar = compile_or_refuse(json_schema=json.dumps(schema))

    if grammar is not None:
        written = write(grammar, TOKENIZER, temperature=1.5, seed=seed, max_tokens=60)
        if written.is_ended:
            with suppress(re.error, TypeError):  # patterns that Python's own expressions do not know
                check(as_validated(json.loads(json.dumps(schema))), written.text)


@fuzz(
    st.one_of(
        st.text(max_size=40), values.map(json.dumps), st.binary(max_size=30).map(lambda data: data.decode("latin-1"))
    ),
    examples=150,
)
def test_any_text_in_place_of_a_schema_or_grammar_is_an_end(text: str) -> None:
    if text:
        for name in ("json_schema", "regex", "grammar", "structural_tag"):
            compile_or_refuse(**{name: text})


@fuzz(patterns)
def test_an_expression_is_refused_or_can_be_answered(pattern: str) -> None:
    if pattern and (grammar := compile_or_refuse(regex=pattern)) is not None:
        write(grammar, TOKENIZER, temperature=1.5, seed=1, max_tokens=30)


lines = st.lists(st.text('ab:=|()[]{}"/*+?,1#\n ', max_size=12).map(lambda body: f"r ::= {body}"), max_size=4)


@fuzz(st.tuples(lines.map("\n".join), st.booleans()))
def test_a_grammar_is_refused_or_can_be_answered(case: tuple[str, bool]) -> None:
    text, is_lark = case
    text = text.replace("r ::=", "start:", 1).replace("::=", ":") if is_lark else text.replace("r ::=", "root ::=", 1)
    if text and (grammar := compile_or_refuse(grammar=text)) is not None:
        write(grammar, TOKENIZER, temperature=1.5, seed=1, max_tokens=30)

"""llguidance with the tokens of one model: compiles the grammars of answers.

The cost of compiling is bounded before, in `schema_walk.py`, `patterns.py` and `grammar_text.py`. `compiler.py` caches
the results. It imports this file when the first grammar is compiled, or the vocabulary prepared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from brlite.config.options import GrammarConfig
from brlite.grammar.answer_grammar import AnswerWriter, read_structural_tag
from brlite.grammar.grammar_text import check_grammar, is_gbnf
from brlite.grammar.matcher import Grammar, GuidedMatcher, Matcher, NumberTokens
from brlite.grammar.patterns import PatternRefused, pattern_size
from brlite.grammar.schema_references import SchemaRefused, escape
from brlite.grammar.schema_walk import WalkedSchema, parse_schema, walk_schema
from brlite.sampling_params import StructuredOutput
from brlite.tokenizer import Tokenizer

NO_TOKEN = 2**32 - 1  # llguidance's INVALID_TOKEN: no mask allows it
# Without it llguidance 1.9.1 never returns from computing the forced tokens of /a+/ /a+/, which its lexer cannot split.
NO_FORCING = '%llguidance {"no_forcing": true}\n'
GBNF_OPTIONS = "%llguidance {}\n"  # at the head of a converted grammar
# Finding the forced tokens of 250,000 characters takes 0.9 s, once for each `MAX_FORCED` tokens, and holds the GIL.
MAX_LITERAL = 32_768  # characters of one text of a grammar; with a longer one, none of its tokens are forced
# Of a long forced text only the beginning is encoded: 200,000 characters took 0.3 s, once for each `MAX_FORCED` tokens.
MAX_ENCODED = 2048  # characters
NUM_UNSURE = 16  # tokens at the end of a text that was cut, which may be others in the whole text
MAX_LEAVES_TRIED = 500  # subschemas that are compiled alone to find the place of an error
_BASE_FUEL, _FUEL_A_CHARACTER = 20_000, 50  # limit of llguidance's initial lexer: enough for long enums
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SPECIAL_IN_PATTERNS = re.compile(r"[\\^$.|?*+()\[\]{}]")


class Library:
    """llguidance with one model's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, config: GrammarConfig) -> None:
        """Reads the vocabulary; for the time see `GrammarCompiler.prepare`."""
        self._config = config
        self._tokenizer = tokenizer
        padding = vocab_size - tokenizer.vocab_size
        self._token_bytes = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self._token_bytes += [b""] * padding
        self._tokens = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_TokenSource(tokenizer, self._token_bytes)),
            n_vocab=vocab_size,
            eos_token=list(tokenizer.eos_token_ids) or None,  # None: that of `_TokenSource`
        )
        self._number_tokens = NumberTokens(self._token_bytes, -(-vocab_size // 32))

    def compile(self, wish: StructuredOutput, num_bytes: int) -> Grammar | str:
        """The grammar, or why it is refused. `num_bytes` is the length of its texts."""
        try:
            return self._compile(wish, num_bytes)
        except (SchemaRefused, PatternRefused) as error:
            return str(error)
        except ValueError as error:  # from llguidance or urllib: a lone surrogate, a malformed URL
            return _first_line(str(error))

    def _compile(self, wish: StructuredOutput, num_bytes: int) -> Grammar:
        overrides = self._json_options(wish.whitespace_pattern)
        is_json = wish.json_schema is not None or wish.json_object
        calls = wish.calls
        text = None
        if is_json:
            walked = self._walk(parse_schema(wish.json_schema or '{"type": "object"}'))
            text = self._json_grammar(walked.schema, overrides)
            inner = self._matcher(text, num_bytes)
            if inner.is_error():
                self._refuse_schema("", walked, inner.get_error(), overrides)
            self._check_warnings({"": walked}, inner.get_grammar_warnings())
        elif wish.structural_tag is not None:
            calls = read_structural_tag(wish.structural_tag)
        elif wish.grammar is not None:
            text = self._text_grammar(wish.grammar)
            inner = self._compiled(text, num_bytes)
        elif wish.regex is not None:
            self._check_pattern("the expression", wish.regex)
            text = llguidance.LLMatcher.grammar_from_regex(self._lark_pattern(wish.regex))
            inner = self._compiled(text, num_bytes)
        elif wish.choice:
            pattern = "|".join(_SPECIAL_IN_PATTERNS.sub(r"\\\g<0>", choice) for choice in wish.choice)
            text = llguidance.LLMatcher.grammar_from_regex(pattern)
            inner = self._compiled(text, num_bytes)

        may_force = self._tokenizer.encodes_in_process and _longest_literal(wish) <= MAX_LITERAL
        if text is not None:
            first_mask = self._first_mask(self._guided(inner, is_json=is_json, may_force=may_force))
        if calls is not None or wish.reasoning is not None:
            writer = AnswerWriter(self._tokenizer, overrides, self._walk, self._lark_pattern, self._check_expression)
            written = writer.write(wish.reasoning, calls, text)
            inner = self._matcher(written.grammar, num_bytes)
            if inner.is_error():
                self._refuse_parts(written.schemas, inner.get_error(), overrides)
            self._check_warnings(written.schemas, inner.get_grammar_warnings())
            first_mask = self._first_mask(self._guided(inner, is_json=is_json, may_force=may_force))
        has_json = is_json or calls is not None
        return Grammar(lambda: self._guided(inner, is_json=has_json, may_force=may_force), first_mask)

    def _guided(self, inner: llguidance.LLMatcher, *, is_json: bool, may_force: bool) -> GuidedMatcher:
        return GuidedMatcher(
            inner.deep_copy(),
            self._token_bytes,
            has_forced_tokens=may_force,
            number_tokens=self._number_tokens if is_json else None,
        )

    def _first_mask(self, matcher: Matcher) -> bytes:
        """The mask of an answer's first token. Raises `PatternRefused` for two faults that compiling does not find: an
        expression that is too large, and one that matches nothing."""
        words = memoryview(bytearray(self._number_tokens.digits.nbytes))
        matcher.fill_masks(words, ())
        if matcher.error is not None:
            raise PatternRefused(matcher.error)
        if not any(words):
            raise PatternRefused("nothing matches it")
        return bytes(words)

    def _matcher(self, grammar: str, num_bytes: int) -> llguidance.LLMatcher:
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=_BASE_FUEL + _FUEL_A_CHARACTER * num_bytes,
            step_lexer_fuel=50_000,
            max_lexer_states=self._config.max_lexer_states,
            max_grammar_size=200_000,
            verbose_errors=False,
        )
        return llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)

    def _compiled(self, grammar: str, num_bytes: int) -> llguidance.LLMatcher:
        inner = self._matcher(grammar, num_bytes)
        if inner.is_error():
            raise PatternRefused(_first_line(inner.get_error()))
        return inner

    # JSON

    def _json_options(self, whitespace_pattern: str | None) -> dict[str, Any]:
        """All JSON options of llguidance. They override a schema's `x-guidance`."""
        options: dict[str, Any] = {"lenient": True, "item_separator": ",", "key_separator": ":"}
        if whitespace_pattern is None:
            return options | {"whitespace_flexible": False}
        self._check_pattern("whitespace_pattern", whitespace_pattern)
        return options | {"whitespace_flexible": True, "whitespace_pattern": whitespace_pattern}

    def _json_grammar(self, schema: Any, overrides: dict[str, Any]) -> str:
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides)  # type: ignore[arg-type]  # a TypedDict with these keys

    def _walk(self, schema: Any) -> WalkedSchema:
        return walk_schema(schema, self._config)

    def _check_warnings(self, schemas: Mapping[str, WalkedSchema], warnings: Sequence[str]) -> None:
        """Refuse a schema with a keyword that llguidance ignores: it would not be enforced."""
        for warning in warnings:
            if warning.startswith("Unknown format"):
                continue  # in a part of the schema without a reference to it
            keywords = re.findall(r'"([^"]+)"', warning) or ["minProperties", "maxProperties"]
            places = [(label, at) for label, walked in schemas.items() for at in walked.with_keyword(*keywords)]
            label, at = places[0] if places else ("", "#")
            raise _refused(label, at, _first_line(warning))

    def _refuse_parts(self, schemas: Mapping[str, WalkedSchema], error: str, overrides: dict[str, Any]) -> NoReturn:
        """Raise for the first schema that does not compile by itself, else for the whole grammar."""
        for label, walked in schemas.items():
            alone = self._matcher(self._json_grammar(walked.schema, overrides), 0)
            if alone.is_error():
                self._refuse_schema(label, walked, alone.get_error(), overrides)
            shared = {name: walked.schema[name] for name in ("$defs", "definitions") if name in walked.schema}
            for name, node in walked.schema.get("properties", {}).items():  # one that is optional spoils no object
                schema = {**shared, **node} if isinstance(node, dict) else {}
                one = self._matcher(self._json_grammar(schema, overrides), 0)
                if one.is_error():
                    raise _refused(label, f"#/properties/{escape(name)}", _first_line(one.get_error()))
        raise PatternRefused(_first_line(error))

    def _refuse_schema(self, label: str, walked: WalkedSchema, error: str, overrides: dict[str, Any]) -> NoReturn:
        """Raise for the first subschema that does not compile by itself, else for the whole schema."""
        below = ("$ref", "properties", "patternProperties", "items", "prefixItems", "anyOf", "allOf", "oneOf")
        leaves = [(at, node) for at, node in walked.places if not any(keyword in node for keyword in below)]
        leaves += [
            (f"{at}/patternProperties", {"type": "string", "pattern": pattern})
            for at, node in walked.places
            for pattern in node.get("patternProperties", ())
        ]
        for pointer, node in leaves[:MAX_LEAVES_TRIED]:
            alone = self._matcher(self._json_grammar(node, overrides), 0)
            if alone.is_error():
                raise _refused(label, pointer, _first_line(alone.get_error()))
        raise _refused(label, "#", _first_line(error))

    # Grammars and expressions

    def _lark_pattern(self, pattern: str) -> str:
        return llguidance.regex_to_lark(pattern, "d")  # \d is 0 to 9, as in schemas

    def _check_pattern(self, what: str, pattern: str) -> None:
        try:
            size = pattern_size(pattern)
        except PatternRefused as error:
            raise PatternRefused(f"{what} {error}") from None
        most = self._config.max_repetitions
        if size > most:
            raise PatternRefused(f"{what} with its repetitions written out has {size} characters; allowed are {most}")

    def _check_expression(self, expression: str) -> None:
        """Raise `PatternRefused` for an expression in Lark's notation that matches nothing."""
        inner = self._compiled(f"start: VALUE\nVALUE: {expression}\n", len(expression))
        self._first_mask(self._guided(inner, is_json=False, may_force=False))

    def _text_grammar(self, text: str) -> str:
        try:
            check_grammar(text, max_rules=self._config.max_rules, max_repetitions=self._config.max_repetitions)
        except PatternRefused as error:
            raise PatternRefused(f"the grammar {error}") from None
        if not is_gbnf(text):
            if "%llguidance" in re.sub(r"%llguidance\s*\{\s*\}", "", text):
                raise PatternRefused("the grammar sets options of llguidance; allowed is %llguidance {}")
            return llguidance.LLMatcher.grammar_from_lark(NO_FORCING + text)
        # Not by `grammar_from`: it first searches for Lark's notation by an expression that takes quadratic time, and
        # holds the GIL. 200,000 line feeds took minutes in which the server answered nothing.
        try:
            lark = gbnf_to_lark(text)
        except Exception as error:  # it raises any exception for a malformed grammar
            raise PatternRefused(_first_line(f"cannot be converted from GBNF: {error}")) from None
        return llguidance.LLMatcher.grammar_from_lark(lark.replace(GBNF_OPTIONS, NO_FORCING, 1))


class _TokenSource:
    """The attributes of a tokenizer that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = next(iter(tokenizer.eos_token_ids), NO_TOKEN)
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        """The token ids of a forced text, which continues the answer, or of its beginning."""
        if not self._tokenizer.encodes_in_process:
            return []
        decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        token_ids = self._tokenizer.encode_continuation(decoded[:MAX_ENCODED])
        return token_ids if len(decoded) <= MAX_ENCODED else token_ids[: max(1, len(token_ids) - NUM_UNSURE)]


def _longest_literal(wish: StructuredOutput) -> int:
    """The characters of the longest text in schemas, choices and calls."""
    parts = wish.calls.parts if wish.calls is not None else ()
    schemas = [wish.json_schema, wish.structural_tag, *(part.schema for part in parts)]
    texts = [text for schema in schemas for text in _JSON_STRING.findall(schema or "")]
    texts += [*wish.choice, *(text for part in parts for text in (part.begin, part.end))]
    return max(map(len, texts), default=0)


def _refused(label: str, pointer: str, reason: str) -> SchemaRefused | PatternRefused:
    """The error for a place in the answer's schema or, with a `label`, in the schema of that tool's arguments."""
    refused = SchemaRefused(pointer, reason)
    return PatternRefused(f"{label}: {refused}") if label else refused


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip() and "non-verbose" not in line]
    return " ".join(lines[:4])[:300] or "it cannot be compiled"

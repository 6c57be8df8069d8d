"""The sampling table: every parameter with its default and its range, the same online and offline.

Ranges that depend on the model (top_k and token ids against the vocabulary) are checked by `check_vocabulary`,
which the engine calls at its door. The mathematics is in `brlite/backends/sampling/reference.py`.
"""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import msgspec

from brlite.errors import InvalidRequest

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing logits by it would overflow fp32
MAX_LOGIT_BIAS = 100.0


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must look like: exactly one of the first six fields. Raises `InvalidRequest` otherwise.

    `json_schema` is a schema as an object or as JSON, `json_object` any JSON object, `regex` matches the whole answer,
    `choice` lists all answers, `grammar` is in Lark's or llama.cpp's notation (GBNF, EBNF). `structural_tag` is free
    text with parts that have a schema: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`.

    JSON is written without whitespace unless `whitespace_pattern`, a regular expression, allows some between tokens.
    `param` names the request's field in errors.
    """

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    param: str = "structured"

    def __post_init__(self) -> None:
        for name in ("json_schema", "structural_tag"):
            value = getattr(self, name)
            if isinstance(value, (dict, bool)):
                msgspec.structs.force_setattr(self, name, json.dumps(value))
        msgspec.structs.force_setattr(self, "choice", tuple(self.choice))
        texts = (self.json_schema, self.regex, self.grammar, self.structural_tag, self.whitespace_pattern, *self.choice)
        if not all(text is None or (isinstance(text, str) and text) for text in texts):
            raise InvalidRequest(f"{self.param}: schemas, patterns, grammars and choices are texts", param=self.param)
        num_wishes = sum(map(bool, (*texts[:4], self.json_object, self.choice)))
        if num_wishes != 1:
            names = "json_schema, json_object, regex, choice, grammar, structural_tag"
            raise InvalidRequest(f"{self.param} must have exactly one of {names}, got {num_wishes}", param=self.param)
        if self.whitespace_pattern and not (self.json_schema or self.json_object or self.structural_tag):
            raise InvalidRequest(f"{self.param}: whitespace_pattern is for JSON only", param=self.param)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the tokens of a completion. Raises `InvalidRequest`, naming the field, when out of range.

    `stop` takes a string or a list; `stop_tokens_ids` is the manual's spelling of `stop_token_ids`, and both add up.
    `max_tokens=None` means half of `build_seq`, or what the context has left if that is less. `logprobs` and
    `prompt_logprobs` count the alternatives reported beside each token (0: only the token itself). Neutral values of
    other front ends are taken: `top_k=0`, `seed=-1`, `max_tokens=-1`, `stop=""`, 6.0 for 6.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    top_n_sigma: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_tokens_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        for name, rule, default in _CHECKS:
            value = getattr(self, name)
            # A default is in range, and a request gives few fields: 7 µs for 23. Each `{}` is a new one.
            if value is not default and not (value == default == {}):
                msgspec.structs.force_setattr(self, name, rule.apply(name, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            allowed = f"at most max_tokens, which is {self.max_tokens}"
            raise InvalidRequest(f"min_tokens must be {allowed}, got {self.min_tokens}", param="min_tokens")
        if self.stop_token_ids or self.stop_tokens_ids:
            stop_token_ids = tuple(dict.fromkeys(self.stop_token_ids + self.stop_tokens_ids))
            msgspec.structs.force_setattr(self, "stop_token_ids", stop_token_ids)
            msgspec.structs.force_setattr(self, "stop_tokens_ids", ())

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` where `top_k` or a token id lies outside a vocabulary of `vocab_size` tokens."""
        if self.top_k > vocab_size:
            raise InvalidRequest(f"top_k must be -1, 0 or 1 to {vocab_size}, got {self.top_k}", param="top_k")
        for param, token_ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            if token_ids:
                check_token_ids(token_ids, vocab_size, param=param)


def check_token_ids(token_ids: Iterable[int], vocab_size: int, *, param: str) -> None:
    """Raise `InvalidRequest` at the first id outside 0 to `vocab_size` - 1."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{param} holds token id {token_id}; allowed are 0 to {vocab_size - 1}", param=param)


class _Rule(NamedTuple):
    """How a field is read (to the type it is declared with) and which of the values read are allowed."""

    read: Callable[[Any], Any]
    is_allowed: Callable[[Any], object]
    allowed: str

    def apply(self, name: str, value: object) -> object:
        try:
            read = self.read(value)
            is_allowed = self.is_allowed(read)
        except (TypeError, ValueError, OverflowError):
            is_allowed = False
        if not is_allowed:
            raise InvalidRequest(f"{name} must be {self.allowed}, got {reprlib.repr(value)}", param=name)
        return read


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a truth value is no number")
    integer = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    if not -(2**63) <= integer < 2**64:
        raise OverflowError("more than 64 bits")
    return integer


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError("not a number")
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("not a truth value")
    return value


def _optional_integer(value: Any) -> int | None:
    return None if value is None else _integer(value)


def _unless_minus_1(value: Any) -> int | None:
    """-1 is None, as front ends of llama.cpp and vLLM write it: a seed by chance, an answer of any length."""
    integer = _optional_integer(value)
    return None if integer == -1 else integer


def _top_k(value: Any) -> int:
    """0 is -1: both mean all tokens, the first in vLLM and llama.cpp, the second in the manual."""
    return _integer(value) or -1


def _top_n_sigma(value: Any) -> float:
    """-1 is 0, off, as llama.cpp writes it."""
    number = _number(value)
    return 0.0 if number == -1 else number


def _items(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)):
        raise TypeError("not a list")
    return () if value is None else tuple(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("not a string that can be found")
    value.encode()  # raises for a lone surrogate, which no output can hold
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """An empty string is no stop string: it is what front ends send for an empty box."""
    return tuple(_text(item) for item in ((value,) if isinstance(value, str) else _items(value)) if item != "")


def _token_ids(value: Any) -> tuple[int, ...]:
    return tuple(_integer(item) for item in _items(value))


def _biases(value: Any) -> dict[int, float]:
    """Token ids may be spelt as strings, as JSON must spell them."""
    biases = {} if value is None else dict(value)
    return {int(key) if isinstance(key, str) else _integer(key): _number(bias) for key, bias in biases.items()}


def _any(value: object) -> bool:
    return True


def _at_least(low: int, read: Callable[[Any], Any] = _integer) -> _Rule:
    return _Rule(read, lambda count: count is None or count >= low, f"a 64-bit integer, at least {low}")


_PENALTY = _Rule(_number, math.isfinite, "a finite number")
_TRUTH = _Rule(_truth, _any, "true or false")
_TOKEN_IDS = _Rule(_token_ids, _any, "a list of token ids")
_RULES = {
    "n": _at_least(1),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _Rule(_number, lambda x: 0 < x < math.inf, "a finite number above 0"),
    "temperature": _Rule(_number, lambda x: 0 <= x < math.inf, "a finite number, at least 0"),
    "top_p": _Rule(_number, lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "top_k": _Rule(_top_k, lambda k: k == -1 or k >= 1, "-1, 0 or a 64-bit integer, at least 1"),
    "min_p": _Rule(_number, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "top_n_sigma": _Rule(_top_n_sigma, lambda x: 0 <= x < math.inf, "-1 or a finite number, at least 0"),
    "seed": _Rule(_unless_minus_1, _any, "a 64-bit integer"),
    "stop": _Rule(_texts, _any, "a string or a list of strings"),
    "stop_token_ids": _TOKEN_IDS,
    "stop_tokens_ids": _TOKEN_IDS,
    "include_stop_str_in_output": _TRUTH,
    "ignore_eos": _TRUTH,
    "max_tokens": _at_least(1, _unless_minus_1),
    "min_tokens": _at_least(0),
    "logit_bias": _Rule(
        _biases,
        lambda biases: all(abs(bias) <= MAX_LOGIT_BIAS for bias in biases.values()),
        f"token ids with numbers in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]",
    ),
    "logprobs": _at_least(0, _optional_integer),
    "prompt_logprobs": _at_least(0, _optional_integer),
    "skip_special_tokens": _TRUTH,
    "structured": _Rule(
        lambda value: value,
        lambda value: value is None or isinstance(value, StructuredOutput),
        "a StructuredOutput, or null",
    ),
}
# Each field that has a rule, with the default that needs none.
_CHECKS = [
    (field.name, _RULES[field.name], {} if field.default_factory is dict else field.default)
    for field in msgspec.structs.fields(SamplingParams)
    if field.name in _RULES
]

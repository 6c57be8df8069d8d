"""Reads the values of sampling parameters in the forms that callers and front ends send.

6.0 stands for 6, -1 for none, one string for a list of strings; numpy's numbers are numbers. The readers raise
`TypeError`, `ValueError`, `OverflowError` or `msgspec.ValidationError`; `params.py` checks ranges and makes the error.
None of them changes a number of the right type between 0 and `UNREAD_BELOW`, so most requests call no reader.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any

import msgspec

from brlite.sampling_params.structured_output import StructuredOutput

ALL_TOKENS = 2**30  # SGLang's `top_k` for all tokens
RANDOM_SEED = 2**32 - 1  # llama.cpp's LLAMA_DEFAULT_SEED
UNREAD_BELOW = min(ALL_TOKENS, RANDOM_SEED)


class NamedProcessor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A logits processor that the config allows, and the arguments of its factory. The fields are vLLM's."""

    name: str = msgspec.field(name="qualname")
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] | None = None


def read_integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a truth value is no number")
    integer = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    if not -(2**63) <= integer < 2**64:
        raise OverflowError("more than 64 bits")
    return integer


def read_number(value: Any) -> float:
    if type(value) is float:  # the check of the abstract class takes 0.3 µs
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError("not a number")
    return float(value)


def read_optional_integer(value: Any) -> int | None:
    return None if value is None else read_integer(value)


def read_unless_minus_1(value: Any) -> int | None:
    """Read -1 as None: a random seed, or an answer of any length. Front ends of llama.cpp and vLLM send -1."""
    integer = None if value is None else read_integer(value)
    return None if integer == -1 else integer


def read_top_k(value: Any) -> int:
    """Read 0 (vLLM, llama.cpp) and 2**30 (SGLang) as -1, the manual's value for all tokens."""
    number = read_integer(value)
    return -1 if number in (0, ALL_TOKENS) else number


def read_seed(value: Any) -> int | None:
    """Read -1 and 2**32 - 1 as None, a random seed. llama.cpp reports its -1 as an unsigned 32-bit number."""
    seed = read_unless_minus_1(value)
    return None if seed == RANDOM_SEED else seed


def read_top_n_sigma(value: Any) -> float:
    """Read -1, llama.cpp's value for off, as 0."""
    number = read_number(value)
    return 0.0 if number == -1 else number


def read_items(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)):
        raise TypeError("not a list")
    return () if value is None else tuple(value)


def read_texts(value: Any) -> tuple[str, ...]:
    """Read a string or a list of strings. "" and [""] are none: front ends send them for an empty input box."""
    texts = (value,) if isinstance(value, str) else read_items(value)
    if texts == ("",):
        return ()
    "".join(texts).encode()  # raises for other types, and for lone surrogates, which no output can have
    return texts


def read_token_ids(value: Any) -> tuple[int, ...]:
    return tuple(read_integer(item) for item in read_items(value))


def read_biases(value: Any) -> dict[int, float]:
    """Read a map of biases. Token ids may be strings of ASCII digits, because JSON keys are strings.

    So that no token has two biases, "07" is not read.
    """
    biases = {} if value is None else dict(value)
    for key in biases:
        if not isinstance(key, str):
            if str(key) in biases:
                raise ValueError(key)
        elif not (key.isascii() and key.isdigit()) or (key[0] == "0" and key != "0"):  # int() would read " 1_0"
            raise ValueError(key)
    return {int(key) if isinstance(key, str) else read_integer(key): read_number(bias) for key, bias in biases.items()}


def read_processors(value: Any) -> tuple[Any, ...]:
    """Read callables, names, and vLLM's `{"qualname": name, "args": [...], "kwargs": {...}}`."""
    return tuple(
        item
        if callable(item) or isinstance(item, NamedProcessor)
        else NamedProcessor(item)
        if isinstance(item, str)
        else msgspec.convert(item, NamedProcessor)
        for item in read_items(value)
    )


def read_structured(value: Any) -> StructuredOutput | None:
    if value is not None and not isinstance(value, StructuredOutput):
        raise TypeError("not a StructuredOutput")
    return value

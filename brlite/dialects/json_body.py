"""Decodes JSON bytes to a request struct, or raises an error in OpenAI's wording that names the field.

For any bytes (deep nesting, endless numbers, NaN, lone surrogates, invalid UTF-8, an empty body) the result is the
struct or `InvalidRequest`. No endpoint is treated specially: the decoder's struct lists the fields.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Generic, TypeVar

import msgspec

from brlite.config.options import LimitsConfig
from brlite.config.type_errors import allowed_values, join_path, read_problem, types_at
from brlite.dialects.object_fields import MAX_FIELD_LENGTH, Shape, check_num_fields, find_unknown, shape_of, skeleton
from brlite.errors import InvalidRequest
from brlite.files.quoting import one_line
from brlite.files.text_file import BYTE_ORDER_MARK, other_encoding

T = TypeVar("T")

MAX_PROBLEM_LENGTH = 160
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # all that msgspec raises for any bytes
# A pair of surrogates, half of one (the group), or any other escape.
_ESCAPE = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)
_TOP_LEVEL = msgspec.json.Decoder(dict[str, msgspec.Raw])


class BodyDecoder(Generic[T]):
    """Decodes request bodies to structs of one type. The first body of a type takes some milliseconds more: reading the
    types of all structs in it."""

    def __init__(self, kind: type[T]) -> None:
        self._kind, self._decoder = kind, msgspec.json.Decoder(kind)

    @functools.cached_property
    def _shape(self) -> Shape:
        return shape_of(self._kind)

    @functools.cached_property
    def _skeleton(self) -> msgspec.json.Decoder[Any]:
        return msgspec.json.Decoder(skeleton(self._shape))

    def decode(self, body: bytes) -> tuple[T, dict[str, msgspec.Raw]]:
        """The struct, and the fields that it and the structs in it lack, by their paths, still encoded.

        Raises as `decode_json` does, and for a field that an object has twice.
        """
        text = body.removeprefix(BYTE_ORDER_MARK).strip(b" \t\r\n")
        try:
            text.isascii() or text.decode()  # msgspec does not check the UTF-8 of values that it skips
            decoded = self._decoder.decode(text)
            known = msgspec.json.encode(self._skeleton.decode(text))
        except DECODE_ERRORS:
            decoded, known = decode_json(body, self._decoder), b"{}"
        if len(known) == len(text):
            return decoded, {}
        try:
            text, known = msgspec.json.format(text, indent=-1), msgspec.json.format(known, indent=-1)
            return decoded, find_unknown(text, self._shape, known) if len(known) < len(text) else {}
        except RecursionError:
            raise _not_json("it is nested too deeply", "") from None


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T], at: str = "") -> T:
    """Decode a body, or the value of the field `at`.

    Raises `InvalidRequest` with `param` and `code` set as in OpenAI's API; paths begin at the top of the body.
    """
    body = body.removeprefix(BYTE_ORDER_MARK)
    try:
        body.isascii() or body.decode()  # msgspec does not check the UTF-8 of values that it skips
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        fault = read_problem(error)
        is_field = at and fault.path and not fault.path.startswith("[")
        path = f"{at}.{fault.path}" if is_field else f"{at}{fault.path}"
        if fault.missing is not None:
            raise missing_field(join_path(path, fault.missing)) from None
        choices = allowed_values(types_at(decoder.type, fault.path)) if fault.problem.startswith("Invalid ") else []
        # The problem may quote a value or a name of any length.
        text = one_line(fault.problem, MAX_PROBLEM_LENGTH) + (f"; allowed: {', '.join(choices)}" if choices else "")
        param = path if fault.unknown is None else join_path(path, fault.unknown[:MAX_FIELD_LENGTH])
        raise InvalidRequest(f"Invalid value for '{path or 'body'}': {text}.", param=param or None) from None
    except msgspec.DecodeError as error:
        raise _not_json(_reason(body, error), at) from None
    except UnicodeDecodeError:
        raise _not_json(other_encoding(body) or "it is not valid UTF-8", at) from None
    except RecursionError:
        raise _not_json("it is nested too deeply", at) from None


def decode_value(raw: msgspec.Raw, decoder: msgspec.json.Decoder[T], param: str) -> T:
    """Decode the value of the field `param`. Raises as `decode_json` does."""
    return decode_json(bytes(raw), decoder, param)


def missing_field(param: str) -> InvalidRequest:
    """The error for a required field that is absent or empty."""
    return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def given_twice(name: str, other: str) -> InvalidRequest:
    """The error for a field that a request gives under two names."""
    return InvalidRequest(f"{name} is another name of {other}; give one of them", param=name)


def check_num_entries(param: str, num_entries: int, limits: LimitsConfig, key: str) -> None:
    """Raise `InvalidRequest` for a list or map of more entries than the limit with this key of `[limits]`."""
    if num_entries > (limit := getattr(limits, key)):
        raise InvalidRequest(
            f"{param} must have at most {limit} entries on this server (limits.{key}), got {num_entries}", param=param
        )


def decode_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The top-level fields of a JSON object, their values still encoded. Raises as `decode_json` does, and for too many
    fields."""
    fields = decode_json(body, _TOP_LEVEL)
    check_num_fields(fields)
    return fields


def _reason(body: bytes, error: msgspec.DecodeError) -> str:
    """Why bytes are not JSON. msgspec has several texts for half a surrogate pair, by what follows it."""
    if not body:
        return "it is empty"
    if any(words in str(error) for words in ("surrogate", "truncated", "hex escape", "unicode escape")):
        half = next((found for found in _ESCAPE.finditer(body) if found[1]), None)
        if half is not None and half.end() < len(body):
            escape = half[1].decode("ascii", "replace")
            return f"{escape} at byte {half.start()} is half of a surrogate pair, which is not a character"
    return other_encoding(body) or str(error)


def _not_json(reason: str, at: str) -> InvalidRequest:
    what = f"the field {at}" if at else "the JSON body of your request"
    return InvalidRequest(f"We could not parse {what}: {reason}.", param=at or None, code="invalid_json")

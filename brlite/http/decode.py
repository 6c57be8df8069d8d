"""JSON bytes to a request struct, or a refusal in OpenAI's words that names the field.

Whatever the bytes are (deep nesting, endless numbers, NaN, half surrogates, not UTF-8, nothing at all) the outcome is
the struct or `InvalidRequest`. It knows no endpoint: the struct behind the decoder is the list of fields.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from brlite.errors import InvalidRequest, RequestError
from brlite.files.text_file import BYTE_ORDER_MARK, other_encoding
from brlite.http.choices import allowed_values

T = TypeVar("T")

_AT = re.compile(r"(?s)(?P<message>.*?)(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`")
_TOP_LEVEL = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode, or raise `InvalidRequest` with `param` and `code` filled as OpenAI does."""
    body = body.removeprefix(BYTE_ORDER_MARK)
    try:
        body.decode()  # msgspec does not look into what no field takes
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_field(error, decoder.type) from None
    except msgspec.DecodeError as error:
        raise _not_json(other_encoding(body) or str(error) if body else "it is empty") from None
    except UnicodeDecodeError:
        raise _not_json(other_encoding(body) or "it is not valid UTF-8") from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None


def decode_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The top-level fields of a JSON object, their values still encoded. Raises as `decode_json` does."""
    return decode_json(body, _TOP_LEVEL)


def _not_json(reason: str) -> InvalidRequest:
    return InvalidRequest(f"We could not parse the JSON body of your request: {reason}.", code="invalid_json")


def _invalid_field(error: msgspec.ValidationError, kind: object) -> RequestError:
    if isinstance(error.__cause__, RequestError):  # raised in a struct's own __post_init__
        return error.__cause__
    match = _AT.fullmatch(str(error))
    assert match is not None  # the path is optional
    message, path = match["message"], match["path"] or ""
    if missing := _MISSING.fullmatch(message):
        param = f"{path}.{missing['field']}".lstrip(".")
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    param = path.lstrip(".")
    if message.startswith("Invalid ") and (choices := allowed_values(kind, path)):
        message += f"; allowed: {', '.join(choices)}"
    return InvalidRequest(f"Invalid value for '{param or 'body'}': {message}.", param=param or None)

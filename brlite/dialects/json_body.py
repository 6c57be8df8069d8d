"""JSON bytes to a request struct, or a refusal in OpenAI's words that names the field.

Whatever the bytes are (deep nesting, endless numbers, NaN, half surrogates, not UTF-8, nothing at all) the outcome is
the struct or `InvalidRequest`. It knows no endpoint: the struct behind the decoder is the list of fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec
from msgspec import inspect

from brlite.errors import InvalidRequest, RequestError
from brlite.files.text_file import BYTE_ORDER_MARK, other_encoding

T = TypeVar("T")

_REFUSALS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # all that msgspec raises for any bytes
_AT = re.compile(r"(?s)(?P<message>.*?)(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`")
_STEP = re.compile(r"\.([^.\[]+)|\[")
_TOP_LEVEL = msgspec.json.Decoder(dict[str, msgspec.Raw])


class BodyDecoder(Generic[T]):
    """Decodes request bodies to structs of one kind.

    A body whose fields are all the struct's is read once. Any other one is read again, for the fields that the struct
    lacks, and for the name of the one that is wrong.
    """

    def __init__(self, kind: type[T]) -> None:
        strict = msgspec.defstruct(kind.__name__, [], bases=(kind,), forbid_unknown_fields=True)
        self._strict: msgspec.json.Decoder[T] = msgspec.json.Decoder(strict)
        self._lenient = msgspec.json.Decoder(kind)
        self._known = frozenset(field.encode_name for field in msgspec.structs.fields(strict))

    def decode(self, body: bytes) -> tuple[T, dict[str, msgspec.Raw]]:
        """The struct, and the fields that it lacks, still encoded. Raises as `decode_json` does."""
        try:
            body.isascii() or body.decode()  # msgspec does not look into what no field takes
            return self._strict.decode(body), {}
        except _REFUSALS:
            decoded = decode_json(body, self._lenient)
            return decoded, {name: raw for name, raw in decode_fields(body).items() if name not in self._known}


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


def allowed_values(kind: object, path: str) -> list[str]:
    """The values of the `Literal`, enum or union tag at `path`, such as `.messages[0].role`; none for other types.

    msgspec says that a value is not among them, but not what they are.
    """
    kinds = [inspect.type_info(kind)]
    steps = [match.group(1) for match in _STEP.finditer(path)]
    for depth, step in enumerate(steps):
        is_last = depth == len(steps) - 1
        structs = [one for one in _flatten(kinds) if isinstance(one, inspect.StructType)]
        if is_last and (tags := [str(one.tag) for one in structs if one.tag_field == step]):
            return tags
        kinds = [inner for one in _flatten(kinds) for inner in _step_into(one, step)]
    values: list[str] = []
    for one in _flatten(kinds):
        if isinstance(one, inspect.LiteralType):
            values += map(str, one.values)
        elif isinstance(one, inspect.EnumType):
            values += [str(member.value) for member in one.cls]
    return values


def _flatten(kinds: list[inspect.Type]) -> Iterator[inspect.Type]:
    for kind in kinds:
        yield from kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _step_into(kind: inspect.Type, name: str | None) -> Iterator[inspect.Type]:
    """The types one step further: of the field `name`, or of the items where the step is an index or a map's key."""
    if isinstance(kind, inspect.StructType):
        yield from (field.type for field in kind.fields if field.encode_name == name)
    elif name is None and isinstance(kind, (inspect.ListType, inspect.VarTupleType)):
        yield kind.item_type
    elif name is None and isinstance(kind, inspect.DictType):
        yield kind.value_type

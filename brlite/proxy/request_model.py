"""A request that may be forwarded, and the fields that the proxy reads of its JSON body: `model` and `user`.

The whole body must be JSON; the upstream checks its other fields. The proxy changes only the model's name.
Uses nothing of routes, upstreams and endpoints.
"""

from __future__ import annotations

import re
from itertools import product
from typing import Any, TypeVar, cast

import msgspec

from brlite.dialects.json_body import DECODE_ERRORS, decode_fields, decode_json
from brlite.http.api_key import ApiKey
from brlite.proxy.wire.heads import RequestHead

T = TypeVar("T")

_NULL = msgspec.Raw(b"null")

# A key `model` whose value is a string, in any object of the body. In JSON only a key is followed by a colon.
_MODEL_FIELD = re.compile(rb'"model"[ \t\n\r]*:[ \t\n\r]*("[^"\\]*(?:\\.[^"\\]*)*")')


class InboundFields(msgspec.Struct, frozen=True, gc=False):
    """The fields of a body. `None`: absent, null, or (only `user`) not a string."""

    model: str | None = None
    user: str | None = None


class Inbound(msgspec.Struct, frozen=True):
    """A received request and its API key. `model` is the requested name."""

    head: RequestHead
    body: bytes
    key: ApiKey
    model: str | None
    user: str | None


def read_inbound(head: RequestHead, body: bytes, key: ApiKey) -> Inbound:
    """Read the fields of the body. Raises `InvalidRequest` as `peek` does."""
    fields = peek(body)
    return Inbound(head, body, key, fields.model, fields.user)


def peek(body: bytes) -> InboundFields:
    """Read the fields. Raises `InvalidRequest` for a body that is no JSON object, or whose model is ambiguous.

    A repeated `model` is refused, and so is another spelling (`Model`), which some servers accept: the upstream must
    answer with the model that the key and the route were checked for.
    """
    try:
        body.isascii() or body.decode()  # msgspec does not check the UTF-8 of values that no field takes
        if body.count(b'"model"') == 1 and b"\\u" not in body:
            # Only an escaped letter could spell a second key `model`. The check saves two calls of the hook, 1 µs.
            plain = _PLAIN.decode(body)
            return InboundFields(plain.model, plain.user)
        model = _Model()
        fields = msgspec.json.decode(body, type=_FIELDS, dec_hook=model.take)
        return InboundFields(model.name, fields.user)
    except DECODE_ERRORS:
        model = _Model()
        odd = decode_json(body, msgspec.json.Decoder(_ODD_FIELDS, dec_hook=model.take))  # raises the error
    try:  # a `user` that is not a string is no error
        user = msgspec.json.decode(odd.user, type=str)
    except DECODE_ERRORS:
        user = None
    return InboundFields(model.name, user)


def replace_model(body: bytes, new: str) -> bytes:
    """The body with the name `new` for its model, else unchanged. `peek` has found another name in the body.

    If another field `model` stands before it, in an inner object, the body is written anew: the values keep their
    bytes, but spaces between them are dropped, and of a repeated field the last value is kept.
    """
    if first := _MODEL_FIELD.search(body):
        replaced = body[: first.start(1)] + msgspec.json.encode(new) + body[first.end(1) :]
        if peek(replaced).model == new:
            return replaced
    return msgspec.json.encode({**decode_fields(body), "model": new})


class _Model:
    """The type of the field `model`. msgspec calls `take` for each one, which shows repeated fields."""

    __slots__ = ("is_taken", "name")

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_taken = False

    def take(self, kind: type[object], value: Any) -> _Model:
        if kind is not _Model:
            raise ValueError("this field must be written 'model'")
        if self.is_taken:
            raise ValueError("it must not stand there twice")
        if value is not None and not isinstance(value, str):
            raise ValueError("it must be a string")
        self.name = value
        self.is_taken = True
        return self


class _OtherSpelling:
    """The type of the fields `Model`, `MODEL` and so on. Accepts no value."""


class _Fields(msgspec.Struct, frozen=True, gc=False):
    model: _Model | msgspec.UnsetType = msgspec.UNSET
    user: str | None = None


class _OddFields(msgspec.Struct, frozen=True, gc=False):
    """The same with any `user`: for type `Any`, msgspec would still refuse a number that is too large."""

    model: _Model | msgspec.UnsetType = msgspec.UNSET
    user: msgspec.Raw = _NULL


def _with_other_spellings(fields: type[T]) -> type[T]:
    spellings = {"".join(letters) for letters in product(*zip("model", "MODEL", strict=True))} - {"model"}
    members = [(spelling, _OtherSpelling, None) for spelling in sorted(spellings)]
    return cast(type[T], msgspec.defstruct(fields.__name__, members, bases=(fields,), frozen=True, gc=False))


_PLAIN = msgspec.json.Decoder(_with_other_spellings(InboundFields))
_FIELDS = _with_other_spellings(_Fields)
_ODD_FIELDS = _with_other_spellings(_OddFields)

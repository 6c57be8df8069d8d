"""Finds what decoding to structs does not tell: fields that no struct declares, and fields that an object has twice.

msgspec ignores the first and keeps the last of the second, in every object of a body. An object of free content
(`metadata`, a JSON schema, the arguments of a call) has no struct, and is not searched. A struct may name more fields
in `no_effect`: those that clients send by default or send back, and that change no answer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType, inspect

from brlite.config.type_errors import join_path, type_info
from brlite.errors import InvalidRequest

MAX_DEPTH = 6  # objects in objects: the body, a message, a tool's result, a document, its source, a block
MAX_FIELDS = 1024  # of one object
MAX_FIELD_LENGTH = 64  # of what an error or a warning shows
MAX_SEARCHED = 32_768  # fields and list items of one body, in 0.1 s at most; the longest chat has 4096 messages
MAX_FOUND = 16  # fields in objects; no more are reported

_KEY = re.compile(rb'[\s,{]*("[^"\\]*(?:\\.[^"\\]*)*")\s*:\s*', re.DOTALL)
_END = re.compile(rb"[\s{]*\}")
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[Raw])
_STRING = msgspec.json.Decoder(str)


def holds(kind: Any) -> msgspec.Meta:
    """For a field that stays encoded (`Annotated[Raw, holds(T)]`): the type that it is decoded to later."""
    return msgspec.Meta(extra={"holds": kind})


class Shape:
    """The objects with declared fields that a value may be or have.

    The value may be an object that has the fields `names`, or a list whose items have the shape `item`. `inner` has the
    shapes of those fields that may be or have more such objects, `no_effect` is a part of `names`. The fields of an
    object are not declared if its `type` begins with one of `left_out`.
    """

    __slots__ = ("inner", "item", "left_out", "names", "no_effect")

    def __init__(self, item: Shape | None = None) -> None:
        self.names: frozenset[str] = frozenset()
        self.inner: dict[str, Shape] = {}
        self.item = item
        self.left_out: tuple[str, ...] = ()
        self.no_effect: tuple[str, ...] = ()


def shape_of(kind: Any) -> Shape:
    """The shape of the values of a type."""
    return _shape(type_info(kind), {}) or Shape()


def _shape(kind: inspect.Type, known: dict[type, Shape]) -> Shape | None:
    if isinstance(kind, inspect.Metadata):
        held = (kind.extra or {}).get("holds")
        return _shape(kind.type if held is None else type_info(held), known)
    if isinstance(kind, inspect.ListType):
        item = _shape(kind.item_type, known)
        return item and Shape(item)
    if isinstance(kind, inspect.UnionType):
        shapes = [shape for each in kind.types if (shape := _shape(each, known))]
        if len(shapes) < 2:
            return shapes[0] if shapes else None
        union = Shape(next((shape.item for shape in shapes if shape.item), None))
        for shape in shapes:
            union.names |= shape.names
            union.inner |= shape.inner
            union.no_effect += shape.no_effect
            union.left_out += shape.left_out
        return union
    if not isinstance(kind, inspect.StructType):
        return None
    if kind.cls not in known:  # a struct may hold others of its type
        shape = known[kind.cls] = Shape()
        shape.no_effect, shape.left_out = (getattr(kind.cls, name, ()) for name in ("no_effect", "left_out"))
        names = [field.encode_name for field in kind.fields]
        shape.names = frozenset((*names, *shape.no_effect, *filter(None, [kind.tag_field])))
        for field in kind.fields:
            if inner := _shape(field.type, known):
                shape.inner[field.encode_name] = inner
    return known[kind.cls]


@functools.cache
def skeleton(shape: Shape, depth: int = MAX_DEPTH) -> Any:
    """A type that keeps the declared fields of each object, absent ones absent, and all else as it is encoded.

    If what it keeps, encoded again, is as long as what it was decoded from, there is nothing else in there.
    """
    if not depth:
        return Raw
    inner = {name: skeleton(each, depth - 1) for name, each in shape.inner.items()}
    fields = [(name, inner.get(name, Raw) | UnsetType, UNSET) for name in shape.names]
    kind: Any = msgspec.defstruct("Object", fields) if shape.names else dict[str, Raw]
    item: Any = Raw if shape.item is None else skeleton(shape.item, depth)
    return kind | list[item] | str | int | float | bool | None


def find_unknown(body: bytes, shape: Shape, known: bytes) -> dict[str, Raw]:
    """The fields that no struct declares, by their paths, such as `tools[].frob`, each with its first value.

    Those that are null are left out, except for the body's own. `body` is an object that is valid for the type, and
    `known` is what its skeleton keeps, both without spaces. Raises `InvalidRequest` for a field that an object has
    twice, and for too many fields or objects.
    """
    # Escapes may be all that differs. Object by object, the search takes ten times as long.
    if not (num_others := _num_keys(body) - _num_keys(known)):
        return {}
    fields = _FIELDS.decode(body)
    check_num_fields(fields)
    others = {name: raw for name, raw in fields.items() if name not in shape.names}
    if _num_keys(msgspec.json.encode(others)) == num_others:
        return others
    search = _Search()
    search.visit(body, shape, "", MAX_DEPTH)
    return search.unknown


def _num_keys(compact: bytes) -> int:
    """The keys of all objects. In a string the quote is escaped, by an odd number of backslashes."""
    compact = compact.replace(b"\\\\", b"__")
    return compact.count(b'":') - compact.count(b'\\":')


def check_num_fields(fields: Mapping[str, Raw], path: str = "") -> None:
    """Raise `InvalidRequest` if an object has too many fields."""
    if len(fields) > MAX_FIELDS:
        text = f"{path or 'the body'} must have at most {MAX_FIELDS} fields, got {len(fields)}"
        raise InvalidRequest(text, param=path or None)


class _Search:
    """The search of one body, object by object, until enough is found."""

    def __init__(self) -> None:
        self.unknown: dict[str, Raw] = {}
        self._num_found = 0  # in objects
        self._num_left = MAX_SEARCHED

    def visit(self, data: bytes, shape: Shape, path: str, depth: int) -> None:
        """Add the unknown fields of the value at `path`."""
        if not depth:
            return
        if data.startswith(b"[") and shape.item is not None:
            items = _ITEMS.decode(data)
            self._count(len(items))
            for item in items:
                if self._is_enough:
                    return
                self.visit(bytes(item), shape.item, f"{path}[]", depth)
        if self._is_enough or not shape.names or not data.startswith(b"{"):
            return
        fields = _FIELDS.decode(data)
        check_num_fields(fields, path)
        self._count(len(fields))
        if len(msgspec.json.encode(fields)) != len(data):
            _check_once(data, fields, path)
        if not fields.keys() <= shape.names and not _is_left_out(fields, shape):
            for name, value in fields.items():
                if name in shape.names or (path and bytes(value) == b"null"):  # null asks for nothing
                    continue
                place = join_path(path, name)
                self._num_found += bool(path) and place not in self.unknown
                self.unknown.setdefault(place, value)
        for name, inner in shape.inner.items():
            if name in fields:
                self.visit(bytes(fields[name]), inner, join_path(path, name), depth - 1)

    @property
    def _is_enough(self) -> bool:
        return self._num_found >= MAX_FOUND or (self._num_found > 0 and self._num_left <= 0)

    def _count(self, num_values: int) -> None:
        self._num_left -= num_values
        if self._num_left < 0 and not self._num_found:
            raise InvalidRequest(
                "a field is not known or is given twice. It cannot be named: the objects of the request have more than "
                f"{MAX_SEARCHED} fields and list items"
            )


def _is_left_out(fields: Mapping[str, Raw], shape: Shape) -> bool:
    raw = bytes(fields.get("type", b""))
    return raw.startswith(b'"') and _STRING.decode(raw).startswith(shape.left_out)


def _check_once(data: bytes, fields: Mapping[str, Raw], path: str) -> None:
    """Raise `InvalidRequest` if the object has a field twice. `fields` has the last value of each."""
    seen: set[str] = set()
    at, name = 0, ""
    while key := _KEY.match(data, at):
        name = _STRING.decode(key[1])
        value = bytes(fields[name])
        if name in seen or not data.startswith(value, key.end()):  # another value is here: the last is elsewhere
            break
        seen.add(name)
        at = key.end() + len(value)
    else:
        if _END.match(data, at):
            return
    name = join_path(path, name[:MAX_FIELD_LENGTH])
    raise InvalidRequest(f"{name} is given twice in one object", param=name)

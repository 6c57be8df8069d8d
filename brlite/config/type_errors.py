"""Parses msgspec's errors and describes the types behind them, for config files and request bodies.

msgspec names the field and the problem. It does not name the value, the whole range, or the allowed values of a
`Literal`, an enum or a union's tag. This file finds them by the path in the error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

# msgspec writes `[...]` for a key or value of a mapping. Real paths have no backtick; the problem's text may have some.
_ERROR = re.compile(r"(?P<problem>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_STEP = re.compile(r"\[(?P<index>\d+|\.\.\.)\]|(?P<name>[^.\[\]]+)")
_NAMES: dict[type[Any], str] = {
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.StrType: "a string",
    inspect.BoolType: "true or false",
    inspect.StructType: "a table",
}

# Cached: reading the types of a struct and of all structs in it takes milliseconds, for each refused request.
type_info = cache(inspect.type_info)


class FieldProblem(NamedTuple):
    """An error at `path`, such as `model[0].devices`; "" is the path of the whole value. `problem` is msgspec's text.

    `unknown` is the name of a field that the type of the object at `path` lacks, `missing` that of a required one.
    """

    path: str
    problem: str
    unknown: str | None
    missing: str | None


def read_problem(error: msgspec.ValidationError) -> FieldProblem:
    """Parse the path and the problem from the text of an error."""
    match = _ERROR.fullmatch(str(error))
    assert match is not None  # the pattern matches any text
    unknown, missing = (pattern.fullmatch(match["problem"]) for pattern in (_UNKNOWN, _MISSING))
    return FieldProblem(match["path"] or "", match["problem"], unknown and unknown[1], missing and missing[1])


def join_path(path: str, name: str) -> str:
    """The path of the field `name` in the object at `path`."""
    return f"{path}.{name}" if path else name


def value_at(data: Any, path: str) -> Any:
    """The value at a path through mappings and lists. Raises `LookupError` or `TypeError` if there is none."""
    for key in _keys(path):
        data = data[key]
    return data


def remove_at(data: Any, path: str) -> bool:
    """Remove the value at a path from its mapping or list. False if there is none, or if the path is ""."""
    keys = _keys(path)
    try:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]
    except (LookupError, TypeError):
        return False
    return True


def _keys(path: str) -> list[int | str]:
    return [int(step["index"]) if step["index"] else step["name"] for step in _STEP.finditer(path)]


def types_at(kind: object, path: str) -> list[inspect.Type]:
    """The types that a value at `path` may have. Empty if the type has no such path; several if a union is on the path.

    For the tag of a union of structs, it is a `Literal` of the tags.
    """
    kinds = [type_info(kind)]
    for step in _STEP.finditer(path):
        members = list(_members(kinds))
        structs = [member for member in members if isinstance(member, inspect.StructType)]
        tags = [str(struct.tag) for struct in structs if step["name"] and struct.tag_field == step["name"]]
        kinds = [inspect.LiteralType(tuple(tags))] if tags else []
        for member in members:
            if isinstance(member, inspect.StructType):
                kinds += (field.type for field in member.fields if field.encode_name == step["name"])
            elif step["index"] and isinstance(member, inspect.ListType | inspect.VarTupleType):
                kinds.append(member.item_type)
            elif step["index"] and isinstance(member, inspect.TupleType):
                kinds.append(member.item_types[0 if step["index"] == "..." else int(step["index"])])
            elif step["index"] and isinstance(member, inspect.DictType):
                kinds.append(member.value_type)
    return kinds


def allowed_values(kinds: Iterable[inspect.Type]) -> list[str]:
    """The allowed values of those types that have a fixed set of values: `Literal` and enum."""
    values: list[str] = []
    for kind in _members(kinds):
        if isinstance(kind, inspect.LiteralType):
            values += map(str, kind.values)
        elif isinstance(kind, inspect.EnumType):
            values += [str(member.value) for member in kind.cls]
    return values


def _members(kinds: Iterable[inspect.Type]) -> Iterator[inspect.Type]:
    """The types without their metadata, with unions replaced by their members."""
    for kind in map(bare, kinds):
        if isinstance(kind, inspect.UnionType):
            yield from _members(kind.types)
        else:
            yield kind


def bare(kind: inspect.Type) -> inspect.Type:
    """A type without its metadata. For a union with exactly one struct, such as a struct or None, the struct."""
    kind = kind.type if isinstance(kind, inspect.Metadata) else kind
    structs = [each for each in getattr(kind, "types", ()) if isinstance(each, inspect.StructType)]
    return structs[0] if len(structs) == 1 else kind


def describe(kind: inspect.Type) -> str:
    """A type and its range in words, for errors of configs and for docs/configuration.md."""
    if isinstance(kind, inspect.Metadata):
        return str((kind.extra or {}).get("allowed") or describe(kind.type))
    if isinstance(kind, inspect.LiteralType):
        return ", ".join(str(value) for value in kind.values)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(describe(member) for member in kind.types if not isinstance(member, inspect.NoneType))
    if isinstance(kind, inspect.TupleType):
        return f"a list of {len(kind.item_types)}, each {describe(kind.item_types[0])}"
    if isinstance(kind, inspect.VarTupleType):
        return f"a list, each {describe(kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return f"a table, each value {describe(kind.value_type)}"
    if isinstance(kind, inspect.StructType):
        return f"a table of {', '.join(field.encode_name for field in kind.fields)}"
    name = _NAMES.get(type(kind), "something else")
    low, above, high = (getattr(kind, bound, None) for bound in ("ge", "gt", "le"))
    if low is not None:
        return f"{name} from {low:.15g} to {high:.15g}" if high is not None else f"{name} of at least {low:.15g}"
    return name if above is None else f"{name} above {above:.15g}, at most {high:.15g}"

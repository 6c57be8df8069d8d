"""Checks plain data against a struct and words what is wrong: one line with the field, its value and what is allowed.

The ranges themselves stand in the struct's types. Knows no files and no particular struct; `config.py` and
`seed_config.py` read through it.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from brlite.errors import ConfigError

T = TypeVar("T")

MAX_SHOWN = 80
SECRET_FIELDS = re.compile(r"keys\.keys.*|key\[\d+\]\.key|upstream\[\d+\]\.api_key", re.DOTALL)  # never shown
# msgspec names the field and the problem, not the value, and calls any value of a mapping `[...]`.
_COMPLAINT = re.compile(r"(?P<problem>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


def convert(data: object, kind: type[T], *, source: str, is_text: bool = False) -> T:
    """Return `data` as a `kind`, or raise a `ConfigError` that begins with `source`, the file or command at fault.

    With `is_text` values may be strings that say what is meant, as on a command line.
    """
    try:
        return msgspec.convert(data, kind, strict=not is_text)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error), data, inspect.type_info(kind))}") from None


def show(value: object) -> str:
    """`value` on one line, as JSON writes it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _explain(complaint: str, data: object, kind: inspect.Type) -> str:
    match = _COMPLAINT.fullmatch(complaint)
    assert match is not None  # the pattern matches any text
    problem, path = match["problem"], (match["path"] or "").removesuffix("[...]")
    at = _follow(data, kind, path)
    if unknown := _UNKNOWN.fullmatch(problem):
        return _explain_unknown(path, unknown[1], at)
    if missing := _MISSING.fullmatch(problem):
        field = _join(path, missing[1])
        return f"{field} is missing: {_allowed(_child(at[1], missing[1]))}"
    shown = "…" if SECRET_FIELDS.fullmatch(path) else show(at[0])
    return f"{path or 'the file'} = {shown}: {_allowed(at[1])}"


def _explain_unknown(path: str, name: str, at: tuple[Any, inspect.Type]) -> str:
    value, kind = at
    assert isinstance(kind, inspect.StructType)  # only structs have fields to be unknown
    allowed = ", ".join(field.encode_name for field in kind.fields)
    return f"{_join(path, name)} = {show(value[name])}: no such field; allowed are {allowed}"


def _follow(data: Any, kind: inspect.Type, path: str) -> tuple[Any, inspect.Type]:
    """The value and the type at the end of `path`, such as `model[0].devices`."""
    for index, name in _STEP.findall(path):
        kind = _child(kind, name)
        data = data[int(index) if index else name]
    return data, kind


def _child(kind: inspect.Type, name: str) -> inspect.Type:
    if isinstance(kind, inspect.StructType):
        return next(field.type for field in kind.fields if field.encode_name == name)
    if isinstance(kind, inspect.TupleType):
        return kind.item_types[0]
    if isinstance(kind, inspect.VarTupleType):
        return kind.item_type
    return kind


def _allowed(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.LiteralType):
        return f"allowed are {', '.join(str(value) for value in kind.values)}"
    return f"allowed is {_describe(kind)}"


def _describe(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return str((kind.extra_json_schema or {}).get("description") or _describe(kind.type))
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_describe(member) for member in kind.types if not isinstance(member, inspect.NoneType))
    if isinstance(kind, inspect.TupleType):
        return f"a list of {len(kind.item_types)}, each {_describe(kind.item_types[0])}"
    if isinstance(kind, inspect.VarTupleType):
        return f"a list, each {_describe(kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return f"a table, each value {_describe(kind.value_type)}"
    return _NAMES.get(type(kind), "something else") + _range(kind)


_NAMES: dict[type[Any], str] = {
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.StrType: "a string",
    inspect.BoolType: "true or false",
    inspect.StructType: "a table",
}


def _range(kind: Any) -> str:
    low, above, high = (getattr(kind, bound, None) for bound in ("ge", "gt", "le"))
    if low is not None:
        return f" from {low:.12g} to {high:.12g}" if high is not None else f" of at least {low:.12g}"
    return "" if above is None else f" above {above:.12g}, at most {high:.12g}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

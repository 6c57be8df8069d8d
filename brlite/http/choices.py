"""Which values the type at a JSON path allows: msgspec says that a value is not among them, but not what they are.

Only the error path comes here. Knows types, not requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from msgspec import inspect

_STEP = re.compile(r"\.([^.\[]+)|\[")


def allowed_values(kind: object, path: str) -> list[str]:
    """The values of the `Literal`, enum or union tag at `path`, such as `.messages[0].role`; none for other types."""
    kinds = [inspect.type_info(kind)]
    steps = [match.group(1) for match in _STEP.finditer(path)]
    for depth, step in enumerate(steps):
        is_last = depth == len(steps) - 1
        if is_last and (tags := [str(one.tag) for one in _structs(kinds) if one.tag_field == step]):
            return tags
        kinds = [inner for one in _flatten(kinds) for inner in _step_into(one, step)]
    return [str(value) for one in _flatten(kinds) for value in _values(one)]


def _flatten(kinds: list[inspect.Type]) -> Iterator[inspect.Type]:
    for kind in kinds:
        yield from kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _structs(kinds: list[inspect.Type]) -> list[inspect.StructType]:
    return [kind for kind in _flatten(kinds) if isinstance(kind, inspect.StructType)]


def _step_into(kind: inspect.Type, name: str | None) -> Iterator[inspect.Type]:
    """The types one step further: of the field `name`, or of the items where the step is an index or a map's key."""
    if isinstance(kind, inspect.StructType):
        yield from (field.type for field in kind.fields if field.encode_name == name)
    elif name is None and isinstance(kind, (inspect.ListType, inspect.VarTupleType)):
        yield kind.item_type
    elif name is None and isinstance(kind, inspect.DictType):
        yield kind.value_type


def _values(kind: inspect.Type) -> list[object]:
    if isinstance(kind, inspect.LiteralType):
        return list(kind.values)
    if isinstance(kind, inspect.EnumType):
        return [member.value for member in kind.cls]
    return []

"""What a traced graph's text says: its inputs, its outputs, its parameters. The text is parsed, never executed.

Biren's tool calls the tensors of a graph by the names that TorchScript gives them when it loads the file: an argument
`input_ids` becomes `input_ids.1`, and a result that has no name of its own becomes its number. That number counts the
values of the outermost function: arguments, then constants, then one for each operation. So it can be told from the
text where that function does nothing but call submodules and cast what they return, as a causal language model's does.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import NamedTuple

PARAMETERS = re.compile(r"^  __parameters__ = \[(.*?)\]", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r'"([^"\\]*)"')
# An operation of the text → the constants that it takes besides those that are written.
DEFAULTS: dict[tuple[str, int], tuple[bool | None, ...]] = {("to", 2): (False, False, None), ("linear", 2): (None,)}


class GraphNames(NamedTuple):
    """The names of a graph's input and of its logits as tools that load the file see them, and what they are called in
    the text. `output_name` is None where the text does not tell."""

    input_name: str
    output_name: str | None
    output_label: str | None


def class_text(source: str, type_name: str) -> str:
    """The part of a source file that is one class; empty if it is not there."""
    name = re.escape(type_name.rpartition(".")[2])
    match = re.search(rf"^class {name}\(Module\):\n(?:^[ \n].*\n?|^\n)*", source, re.MULTILINE)
    return match[0] if match else ""


def parameter_names(text: str) -> frozenset[str]:
    """The names of a class's own parameters. Other tensors are buffers, which hold no weights."""
    match = PARAMETERS.search(text)
    return frozenset(QUOTED.findall(match[1])) if match else frozenset()


def graph_names(text: str) -> GraphNames | None:
    """The names in a module's `forward`; None if it has none that can be read."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    forward = next(
        (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "forward"), None
    )
    if forward is None or len(forward.args.args) < 2:
        return None
    result = forward.body[-1].value if isinstance(forward.body[-1], ast.Return) else None
    label, tensor = _logits(_assigned(result, forward))
    number = None if tensor is None else _number(_assigned(tensor, forward), forward)
    return GraphNames(f"{forward.args.args[1].arg}.1", None if number is None else str(number), label)


def _assigned(value: ast.expr | None, forward: ast.FunctionDef) -> ast.expr | None:
    """What a variable stands for: the text gives each of them once."""
    for statement in forward.body:
        match statement, value:
            case ast.Assign(targets=[ast.Name(id=name)], value=assigned), ast.Name(id=wanted) if name == wanted:
                return assigned
    return value


def _logits(result: ast.expr | None) -> tuple[str | None, ast.expr | None]:
    """What the first of the returned tensors is called, and its expression."""
    match result:
        case ast.Dict(keys=[ast.Constant(value=str(key)), *_], values=[first, *_]):
            return key, first
        case ast.Tuple(elts=[first, *_]):
            return None, first
        case _:
            return None, result


def _number(tensor: ast.expr | None, forward: ast.FunctionDef) -> int | None:
    """The number of the value that `tensor` makes. None where it cannot be told, or is a submodule's result: that has
    its number from inside the submodule."""
    values = _Values()
    try:
        for statement in forward.body:
            values.count(statement)
    except _Unknown:
        return None
    match tensor:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"))) if tensor in values.made:
            return len(forward.args.args) + len(values.constants) + values.made.index(tensor)
        case _:
            return None


class _Unknown(Exception):
    """Values of the text that cannot be counted without TorchScript's own tables."""


class _Values:
    """The values of a function: its constants, each once, and what makes the others, in their order."""

    def __init__(self) -> None:
        self.constants: set[tuple[str, object]] = set()
        self.made: list[ast.expr] = []

    def count(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(value=value) | ast.Return(value=value):
                self._add(value)
            case _:
                raise _Unknown

    def _add(self, node: ast.expr | None) -> None:
        if isinstance(node, ast.Constant):
            self.constants.add((type(node.value).__name__, node.value))
        elif node is not None and not isinstance(node, ast.Name):
            for part in _parts(node):
                self._add(part)
            self.made.append(node)


def _parts(node: ast.expr) -> Sequence[ast.expr | None]:
    """What has to be there before `node` can be made."""
    match node:
        case ast.Dict(keys=keys, values=values):
            return [part for pair in zip(keys, values, strict=True) for part in pair]
        case ast.Tuple(elts=parts):
            return parts
        case ast.Attribute(value=part) | ast.Call(func=ast.Name(id="getattr"), args=[part, ast.Constant()]):
            return [part]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name), args=parts):
            return [*parts, *_defaults(name, len(parts))]
        case ast.Call(func=ast.Attribute(value=module, attr="forward"), args=parts):
            return [module, *parts]
        case _:
            raise _Unknown


def _defaults(name: str, num_arguments: int) -> list[ast.expr]:
    if (name, num_arguments) not in DEFAULTS:
        raise _Unknown
    return [ast.Constant(value) for value in DEFAULTS[name, num_arguments]]

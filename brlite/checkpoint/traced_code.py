"""What a traced graph's text says: its inputs, its outputs, its parameters. The text is parsed, never executed.

Biren's tool calls the tensors of a graph by the names that TorchScript gives them when it loads the file: an argument
`input_ids` becomes `input_ids.1`, and a result that has no name of its own becomes its number. That number counts the
values of the outermost function: arguments, then constants, then one for each operation. So it can be told from the
text where that function does nothing but call submodules and cast what they return, as a causal language model's does.
"""

from __future__ import annotations

import ast
import re
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
        nodes = ast.walk(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    forward = next((node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "forward"), None)
    if forward is None or len(forward.args.args) < 2:
        return None
    input_name = f"{forward.args.args[1].arg}.1"
    assigned: dict[str, ast.expr] = {}
    constants: set[tuple[str, object]] = set()
    made: list[ast.expr] = []
    can_count, result = True, None
    for statement in forward.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                assigned.setdefault(name, value)
            case ast.Return(value=value):
                result = value
            case _:
                value, can_count = None, False
        try:
            can_count = can_count and _count(value, constants, made)
        except RecursionError:  # a chain of some hundred attributes
            can_count = False

    label, tensor = None, _named(result, assigned)
    match tensor:  # the first of the returned tensors
        case ast.Dict(keys=[ast.Constant(value=str(key)), *_], values=[first, *_]):
            label, tensor = key, _named(first, assigned)
        case ast.Tuple(elts=[first, *_]):
            tensor = _named(first, assigned)
    match tensor:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"))) if can_count and tensor in made:
            number = len(forward.args.args) + len(constants) + made.index(tensor)
            return GraphNames(input_name, str(number), label)
        case _:  # it cannot be told, or a submodule made the tensor, and numbered it
            return GraphNames(input_name, None, label)


def _named(value: ast.expr | None, assigned: dict[str, ast.expr]) -> ast.expr | None:
    """What a variable stands for: the text gives each of them once."""
    return assigned.get(value.id, value) if isinstance(value, ast.Name) else value


def _count(node: ast.expr | None, constants: set[tuple[str, object]], made: list[ast.expr]) -> bool:
    """Add the constants of an expression, each once, and what makes its other values, in their order. False where that
    takes TorchScript's own tables."""
    parts: list[ast.expr | None]
    match node:
        case None | ast.Name():
            return True
        case ast.Constant(value=value):
            constants.add((type(value).__name__, value))
            return True
        case ast.Dict(keys=keys, values=values):
            parts = [part for pair in zip(keys, values, strict=True) for part in pair]
        case ast.Tuple(elts=elements):
            parts = [*elements]
        case ast.Attribute(value=part) | ast.Call(func=ast.Name(id="getattr"), args=[part, ast.Constant()]):
            parts = [part]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name), args=args) if (
            name,
            len(args),
        ) in DEFAULTS:
            parts = [*args, *(ast.Constant(value) for value in DEFAULTS[name, len(args)])]
        case ast.Call(func=ast.Attribute(value=module, attr="forward"), args=args):
            parts = [module, *args]
        case _:
            return False
    is_counted = all(_count(part, constants, made) for part in parts)
    made.append(node)
    return is_counted

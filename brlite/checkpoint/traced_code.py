"""Reads a traced graph's source text: its input, the key of its output, its parameters. Parses, and never executes.

TorchScript renames an argument `input_ids` to `input_ids.1` when it loads the file. It numbers tensors without a name,
such as the output in the manual's configs. These numbers are not computed here: brlite accepts any.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

PARAMETERS = "\n  __parameters__ = ["
MAX_PARSED_CHARACTERS = 2**20  # of one class: Python's parser takes up to 400 bytes for each
OUTER_LINE = re.compile(r"^[^ \n]", re.MULTILINE)


class GraphNames(NamedTuple):
    """The name of a graph's input, as tools that load the file show it, and the key of the logits that it returns.

    `output_key` is None for a graph that returns a tuple or a tensor.
    """

    input_name: str
    output_key: str | None


def class_text(source: str, type_name: str) -> str:
    """The lines of a source file that define a class; empty if there are none."""
    head = f"\nclass {type_name.rpartition('.')[2]}(Module):\n"
    begin = f"\n{source}".find(head)
    end = OUTER_LINE.search(source, begin + len(head) - 1)
    return source[begin : end.start() if end else None] if begin >= 0 else ""


def parameter_list(text: str) -> str:
    """The names of a class's own parameters, quoted. Other tensors are buffers, which hold no weights."""
    names, end, _ = text.partition(PARAMETERS)[2].partition("]")
    return names if end else ""


def graph_names(text: str) -> GraphNames | None:
    """The names in a module's `forward`; None if `text` has no `forward` that can be parsed."""
    if len(text) > MAX_PARSED_CHARACTERS:
        return None
    try:
        nodes = ast.walk(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    forward = next((node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "forward"), None)
    if forward is None or len(forward.args.args) < 2:
        return None
    assigned: dict[str, ast.expr] = {}
    key = None
    for statement in forward.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                assigned[name] = value
            case ast.Return(value=ast.Dict(keys=[ast.Constant(value=str(first)), *_])):
                key = first
            case ast.Return(value=ast.Name(id=name)):
                match assigned.get(name):
                    case ast.Dict(keys=[ast.Constant(value=str(first)), *_]):
                        key = first
    return GraphNames(f"{forward.args.args[1].arg}.1", key)

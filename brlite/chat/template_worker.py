"""Compiles and renders one chat template. Runs in a child process (`process/sandbox_child.py`), never in the server.

The capabilities of a template are found by trial: when it is loaded, short chats with a probe word are rendered.
Imports jinja2 and the standard library, never brlite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain, product
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A rendered chat has at most MAX_GROWTH times the characters of its input, plus MAX_MARKUP.
MAX_GROWTH = 16
MAX_MARKUP = 64 * 1024
# The mark put into the texts of control tokens in the input is the first of these characters that the input lacks.
MARKS = (range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))

PROBE = "a7c4e1b6"  # a word that no template contains
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
# By role, a chat with a turn of that role. A template that supports the role writes its content or refuses the chat.
ROLE_PROBES: dict[str, list[dict[str, Any]]] = {
    "system": [{"role": "system", "content": PROBE}, USER],
    "developer": [{"role": "developer", "content": PROBE}, USER],
    "assistant": [USER, {"role": "assistant", "content": PROBE}, USER],
    "tool": [USER, ANSWER, {"role": "tool", "content": PROBE}, USER],
    "function": [USER, ANSWER, {"role": "function", "content": PROBE}, USER],
    "later system": [USER, ANSWER, {"role": "system", "content": PROBE}, USER],
    "": [USER, ANSWER, {"role": "narrator", "content": PROBE}, USER],  # any other role
}
TOOLS_VARIABLES = ("tools", "xml_tools")  # SmolLM3 reads the second
SHORT_ID, LONG_ID = "a1b2c3d4e", "call_a1b2c3d4e5f6a7b8"


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "d"}}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def create(template: str, controls: str, variables: Mapping[str, str]) -> Renderer:
    return Renderer(template, controls, variables)


class Renderer:
    """One compiled template. `controls` is a regular expression for the texts of control tokens, "" without any.

    `variables` are the special tokens by name.
    """

    def __init__(self, template: str, controls: str, variables: Mapping[str, str]) -> None:
        self._source = template
        self._environment = _environment()
        self._template = self._environment.from_string(template)
        self._variables = variables
        # The first character of each control token's text, overlapping ones too.
        self._controls = re.compile(f"(?={controls}).", re.DOTALL) if controls else None

    def describe(self) -> dict[str, Any]:
        """The template's capabilities: fields of `TemplateCapabilities` (`turns.py`)."""
        roles = {role: self._says(messages) for role, messages in ROLE_PROBES.items()}
        parts = [{"type": "text", "text": PROBE}]
        takes_parts = bool(self._says([{**USER, "content": parts}], without=("'text': ", '"text": ')))
        system = {"role": "system", "content": "b"}
        tools_in = None
        probes: list[Any] = [_tool(PROBE)]
        tools_variable = next((name for name in TOOLS_VARIABLES if self._says([USER], **{name: probes})), None)
        if tools_variable is not None:
            tools_in = "argument"
        elif self._says([{**system, "tools": [_tool(PROBE)]}, USER]):
            tools_in = "system message"
        elif self._says([{**system, "tools": PROBE}, USER]):  # Phi-4-mini
            tools_in = "system message, as text"
        return {
            "roles": roles,
            "takes_strings": not takes_parts or bool(self._says([{**USER, "content": PROBE}])),
            "takes_parts": takes_parts,
            "tools_in": tools_in,
            "tools_variable": tools_variable or "tools",
            "variables": sorted(meta.find_undeclared_variables(self._environment.parse(self._source))),
            **self._describe_calls(tools_variable or "tools", says_tool_turns=bool(roles["tool"])),
        }

    def _describe_calls(self, tools_variable: str, *, says_tool_turns: bool) -> dict[str, Any]:
        """The form that assistant turns with calls must have, and whether the template writes the results of tools.

        `says_tool_turns`: it writes turns of the role `tool` where no call precedes them.
        """
        tools: dict[str, Any] = {tools_variable: [_tool("b")]}
        for arguments, content in product(({"x": "a"}, '{"x": "a"}'), ({"content": ""}, {})):
            form: dict[str, Any] = {"arguments": arguments, "content": content}
            if self._says(_calls(**form, name=PROBE), without=("{'x': 'a'}",), **tools):
                return {
                    "says_calls": True,
                    "says_results": bool(self._says(_calls(**form, result=PROBE), **tools)),
                    "takes_mappings": isinstance(arguments, dict),
                    "takes_empty_content": bool(content),
                    "needs_short_ids": not self._says(_calls(**form, name=PROBE, call_id=LONG_ID), **tools),
                }
        return {"says_calls": False, "says_results": says_tool_turns}

    def answer(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, extras: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The text and, if the input has the text of a control token, the mark after that text's first character.

        `extras` are the template's other variables: `tools`, `documents`, `enable_thinking` and the like.
        """
        values: dict[str, Any] = {"tools": None, **extras, "messages": messages}
        encoded = json.dumps(values, ensure_ascii=False)
        mark = None
        if self._controls is not None:
            chars = map(chr, chain(*MARKS))
            mark = next(char for char in chars if char not in encoded and _escaped(char) not in encoded)
            marked = {name: _marked(value, self._controls, mark) for name, value in values.items()}
            # A template may make tokens of the turns' roles, which the server has checked.
            marked["messages"] = [
                {**turn, "role": plain.get("role")} for turn, plain in zip(marked["messages"], messages, strict=True)
            ]
            mark, values = (None, values) if marked == values else (mark, marked)
        pieces = self._template.generate({**values, **self._variables, "add_generation_prompt": add_generation_prompt})
        text = _join(pieces, MAX_GROWTH * len(encoded) + MAX_MARKUP)
        if mark is not None:  # `tool | string` and `tojson` in ASCII escape it
            text = text.replace(_escaped(mark), mark)
        return {"text": text, "mark": mark}

    def _says(self, messages: list[dict[str, Any]], *, without: Sequence[str] = (), **extras: Any) -> bool | None:
        """Whether the rendered chat contains the probe and none of `without`. None if the template refuses the chat."""
        try:
            text = self.answer(messages, add_generation_prompt=True, extras=extras)["text"]
        except Exception:  # a template may raise anything; a request with such a chat gets the error
            return None
        return PROBE in text.lower() and not any(each in text for each in without)


def _calls(
    *,
    arguments: object,
    content: Mapping[str, str],
    name: str = "b",
    result: str = "c",
    call_id: str = SHORT_ID,
) -> list[dict[str, Any]]:
    """A question, a call, and its result."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        USER,
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "name": "b", "content": result},
    ]


def _escaped(char: str) -> str:
    return ascii(char)[1:-1]


def _marked(value: Any, controls: re.Pattern[str], mark: str) -> Any:
    """`value` with the mark in every control token's text."""
    if isinstance(value, str):
        return controls.sub(rf"\g<0>{mark}", value)
    if isinstance(value, list):
        return [_marked(item, controls, mark) for item in value]
    if isinstance(value, dict):
        return {_marked(key, controls, mark): _marked(item, controls, mark) for key, item in value.items()}
    return value


class GenerationTag(Extension):
    """`{% generation %}` marks the model's own text, for training. Its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _strftime_now(date_format: str) -> str:
    return datetime.now().strftime(date_format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which models do not have in their training data.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _join(pieces: Iterable[str], max_length: int) -> str:
    kept: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > max_length:
            raise ValueError(f"it writes more than {max_length} characters for these messages")
        kept.append(piece)
    return "".join(kept)

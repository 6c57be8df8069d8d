"""Compiles and renders one chat template. Runs in a child process (`process/sandbox_child.py`), never in the server.

The capabilities of a template are found by trial: when it is loaded, short chats with a probe word are rendered.
Imports jinja2 and the standard library, never brlite.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def create(template: str, controls: str, control_texts: list[str], variables: Mapping[str, str]) -> Renderer:
    return Renderer(template, ControlMarks(controls, control_texts) if controls else None, variables)


class ControlMarks:
    """Marks the texts of control tokens in the input. A mark follows the first character of each, overlapping ones too.

    The end of a value may begin such a text, which the template completes with the next value: it is marked, too.
    """

    def __init__(self, pattern: str, texts: list[str]) -> None:
        """`pattern` is a regular expression for `texts`, which are sorted."""
        self._whole = re.compile(pattern)
        self._begins = re.compile(f"(?={pattern}).", re.DOTALL)
        # Without letters: templates compare words such as a part's type, which a mark at the end would change.
        self._firsts = {text[0] for text in texts if not text[0].isalnum()}
        self._texts = texts
        self._longest = max(map(len, texts))

    def put(self, value: Any, mark: str, *, everywhere: bool = False) -> Any:
        """`value` with the marks. `everywhere`: also where a character only might begin the text of a control token."""
        if isinstance(value, str):
            if not everywhere:
                return self._put(value, mark)
            for first in self._firsts:
                value = value.replace(first, f"{first}{mark}")
            return value
        if isinstance(value, list):
            return [self.put(item, mark, everywhere=everywhere) for item in value]
        if isinstance(value, dict):
            pairs = ((self.put(each, mark, everywhere=everywhere) for each in pair) for pair in value.items())
            return dict(map(tuple, pairs))
        return value

    def unmarked(self, text: str, mark: str) -> list[str]:
        """The control tokens in a rendered text whose texts are not marked."""
        found = self._whole.finditer(text)
        return [match[0] for match in found if not text.startswith(mark, match.start() + 1)]

    def _put(self, value: str, mark: str) -> str:
        text = self._begins.sub(rf"\g<0>{mark}", value)
        end = len(text.rstrip())  # templates trim values
        for start in range(end - 1, max(0, end - self._longest) - 1, -1):
            if text[start] in self._firsts and self._has_beginning(text[start:end]):
                text = f"{text[: start + 1]}{mark}{text[start + 1 :]}"
        return text

    def _has_beginning(self, beginning: str) -> bool:
        index = bisect_left(self._texts, beginning)
        return index < len(self._texts) and self._texts[index].startswith(beginning)


class Renderer:
    """One compiled template. `controls` is None without control tokens. `variables` are the special tokens by name."""

    def __init__(self, template: str, controls: ControlMarks | None, variables: Mapping[str, str]) -> None:
        self._source = template
        self._environment = _environment()
        self._template = self._environment.from_string(template)
        self._variables = variables
        self._controls = controls
        self._removes_text = any(name in template for name in ("replace", "join"))

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
        """The text and, if the input has or begins the text of a control token, the mark in it.

        `extras` are the template's other variables: `tools`, `documents`, `enable_thinking` and the like.
        """
        values: dict[str, Any] = {"tools": None, **extras, "messages": messages}
        encoded = json.dumps(values, ensure_ascii=False)
        max_length = MAX_GROWTH * len(encoded) + MAX_MARKUP

        def render(values: Mapping[str, Any]) -> str:
            given = {**values, **self._variables, "add_generation_prompt": add_generation_prompt}
            return _join(self._template.generate(given), max_length)

        if self._controls is None:
            return {"text": render(values), "mark": None}
        chars = map(chr, chain(*MARKS))
        mark = next(char for char in chars if char not in encoded and _escaped(char) not in encoded)
        text, has_marks = self._render_marked(values, self._controls, mark, render)
        return {"text": text, "mark": mark if has_marks else None}

    def _render_marked(
        self, values: Mapping[str, Any], controls: ControlMarks, mark: str, render: Callable[[Mapping[str, Any]], str]
    ) -> tuple[str, bool]:
        """The text of the values with marks, and whether they have any."""

        def marked(*, everywhere: bool) -> dict[str, Any]:
            found = {name: controls.put(value, mark, everywhere=everywhere) for name, value in values.items()}
            # A template may make tokens of the turns' roles, which the server has checked.
            turns = zip(found["messages"], values["messages"], strict=True)
            return {**found, "messages": [{**turn, "role": plain.get("role")} for turn, plain in turns]}

        def rendered(values: Mapping[str, Any]) -> str:  # `tool | string` and `tojson` in ASCII escape the mark
            return render(values).replace(_escaped(mark), mark)

        given = marked(everywhere=False)
        text = rendered(given)
        if self._removes_text and (guarded := marked(everywhere=True)) not in (values, given):
            # A control token may be left of a message behind a `replace`. It is none of the template's own if it is
            # not there when all that might begin one is marked.
            other = rendered(guarded)
            if controls.unmarked(other, mark) != controls.unmarked(text, mark):
                given, text = guarded, other
        return text, given != values

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

"""Calls as JSON objects, each with the tool's name and its arguments, behind a mark: one by one or in a list.

The formats differ in their texts only, which are the attributes of their classes. Any of them is read with or without
the list's brackets, and with the usual keys in any order, because models mix the forms.
"""

from __future__ import annotations

import json
from typing import ClassVar

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import BrokenCall, Step, parse_json
from brlite.chat.tools import Tool

_NAMES, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")


class JsonParser(ToolCallParser):
    """A list of calls: the format of the subclasses that set only marks."""

    brackets = ("[", "]")
    separator = ", "
    keys: ClassVar[tuple[str, str]] = ("name", "arguments")

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        name, arguments = cls.keys
        return cls.enclosed(f'{{"{name}": {json.dumps(tool.name)}, "{arguments}": ', "}")

    def read_calls(self) -> Step[None]:
        source = self._source
        yield from source.spaces()
        yield from source.take(self.brackets[0].strip())
        yield from source.spaces()
        yield from source.take("[")
        yield from source.spaces()
        while True:
            yield from self._json_call()
            yield from source.spaces()
            if (yield from source.take(",", ";")):
                yield from source.spaces()
                yield from source.take(self.call_mark)
                yield from source.spaces()
            if (yield from source.peek()) != "{":
                break
        yield from source.take("]")
        if self.end_mark:
            yield from source.spaces()
            yield from source.take_end(self.end_mark)

    def _json_call(self) -> Step[None]:
        """Read one call. Other keys than those of the name and the arguments are ignored."""
        source = self._source
        yield from source.expect("{")
        name: str | None = None
        arguments: str | None = None
        has_arguments = False
        yield from source.spaces()
        while (yield from source.peek()) == '"':
            key = yield from source.json_string()
            yield from source.spaces()
            yield from source.expect(":")
            yield from source.spaces()
            pieces: list[str] = []
            if key in _NAMES and name is None:
                name = yield from source.json_string()
                self._begin(name)
            elif key not in _ARGUMENTS or has_arguments:
                yield from source.json_value(pieces.append)
            elif name is not None:
                yield from self._json_arguments()
                has_arguments = True
            else:
                yield from source.json_value(pieces.append)
                arguments, has_arguments = "".join(pieces), True
            yield from source.spaces()
            if not (yield from source.take(",")):
                break
            yield from source.spaces()
        yield from source.expect("}")
        if name is None:
            raise BrokenCall("it has no name")
        if arguments is not None:
            value = parse_json(arguments)
            self._arguments(value or "{}" if isinstance(value, str) else "{}" if value is None else arguments)
        elif not has_arguments:
            self._arguments("{}")
        self._end()


class HermesParser(JsonParser):
    """Hermes and Qwen; also models whose template does not support tools."""

    name = "hermes"
    marks = ("<tool_call>", "</tool_call>")
    call_mark, end_mark = marks
    brackets, separator, marks_each = ("\n", "\n"), "\n", True


class Llama3JsonParser(JsonParser):
    """Llama 3.1 to 3.3: the mark is written before code, and before calls by some models."""

    name = "llama3_json"
    marks = ("<|python_tag|>",)
    call_mark = marks[0]
    brackets, separator, keys, is_leading = ("", ""), "; ", ("name", "parameters"), True


class XLamParser(JsonParser):
    """xLAM 2: the reply is the list. SmolLM2 and earlier xLAM write it between the marks."""

    name = "xlam"
    marks = HermesParser.marks
    call_mark, end_mark = marks
    is_leading = True


class GraniteParser(JsonParser):
    """Granite 3."""

    name = "granite"
    marks = ("<|tool_call|>",)
    call_mark = marks[0]


class Phi4MiniParser(JsonParser):
    """Phi-4-mini."""

    name = "phi4_mini"
    marks = ("<|tool_call|>", "<|/tool_call|>")
    call_mark, end_mark = marks


class FunctoolsParser(JsonParser):
    """FireFunction 2, and Phi-4-mini with vLLM's template."""

    name = "functools"
    marks = ("functools",)
    call_mark = marks[0]


class NemotronParser(JsonParser):
    """Llama Nemotron, Nemotron Nano 2."""

    name = "nemotron"
    marks = ("<TOOLCALL>", "</TOOLCALL>")
    call_mark, end_mark = marks


class ToolCallsParser(JsonParser):
    """Apriel, Hunyuan A13B, Jamba, MiniMax M1."""

    name = "tool_calls"
    marks = ("<tool_calls>", "</tool_calls>")
    call_mark, end_mark = marks


class InternLmParser(JsonParser):
    """InternLM 2, 2.5 and 3."""

    name = "internlm"
    marks = ("<|action_start|>", "<|plugin|>", "<|action_end|>")
    call_mark, _, end_mark = marks
    brackets, separator, marks_each = ("<|plugin|>\n", ""), "", True
    keys = ("name", "parameters")


class CommandRParser(JsonParser):
    """Command R7B and A. The numbers of calls, which a grammar cannot count, are left out there."""

    name = "command"
    marks = ("<|START_ACTION|>", "<|END_ACTION|>")
    call_mark, end_mark = marks
    keys = ("tool_name", "parameters")

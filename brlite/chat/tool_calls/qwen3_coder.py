"""Qwen3-Coder: `<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`, with line feeds between."""

from __future__ import annotations

import json

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser, property_schemas, typed_value
from brlite.chat.tool_calls.source import BrokenCall, Step
from brlite.chat.tools import Tool

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3CoderParser(ToolCallParser):
    """Strings are written without quotes, so a parameter's schema decides whether its value is a string."""

    name = "qwen3_coder"
    marks = (BEGIN, END)

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        parameters = {"begin": f"{PARAMETER}{{}}>\n", "end": f"\n{PARAMETER_END}\n", "has_plain_strings": True}
        return CallGrammar(
            trigger=BEGIN,
            begin=f"{BEGIN}\n{FUNCTION}{tool.name}>\n",
            end=f"{FUNCTION_END}\n{END}",
            separator="\n",
            parameters=parameters,
        )

    def read_reply(self) -> Step[None]:
        # Some models leave BEGIN out. The grammar of calls requires it.
        marks = (BEGIN,) if self._streams_arguments else (BEGIN, FUNCTION)
        while mark := (yield from self._source.until(marks, self._content)):
            yield from self._call(self._tagged(mark), self._source.at - len(mark))

    def _tagged(self, mark: str) -> Step[None]:
        source = self._source
        if mark == BEGIN:
            yield from source.spaces()
            yield from source.expect(FUNCTION)
        name, _ = yield from source.text_until(">")
        name = name.strip().strip('"')
        self._begin(name)
        schemas = property_schemas(self._tools[name])
        separator = "{"
        yield from source.spaces()
        while (yield from source.take(PARAMETER)):
            key, _ = yield from source.text_until(">")
            key = key.strip().strip('"')
            value, _ = yield from source.text_until(PARAMETER_END)
            value = value.removeprefix("\n").removesuffix("\n")
            key_text = json.dumps(key, ensure_ascii=False)
            self._arguments(f"{separator}{key_text}: {typed_value(value, schemas.get(key))}")
            separator = ", "
            yield from source.spaces()
        self._arguments("{}" if separator == "{" else "}")
        if not (yield from source.take(FUNCTION_END)) and not (yield from source.take(END)):
            raise BrokenCall(f"{FUNCTION_END!r} is missing")
        self._end()
        yield from source.spaces()
        yield from source.take_end(END)

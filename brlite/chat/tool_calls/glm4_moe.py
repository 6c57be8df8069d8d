"""GLM-4.5 and later: `<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>`, on several lines."""

from __future__ import annotations

import json

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser, property_schemas, typed_value
from brlite.chat.tool_calls.source import Step
from brlite.chat.tools import Tool

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class Glm4MoeParser(ToolCallParser):
    """Strings are written without quotes, so a parameter's schema decides whether its value is a string."""

    name = "glm4_moe"
    marks = (BEGIN, END, KEY, KEY_END, VALUE, VALUE_END)
    call_mark = BEGIN

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        parameters = {"begin": f"{KEY}{{}}{KEY_END}\n{VALUE}", "end": f"{VALUE_END}\n", "has_plain_strings": True}
        return CallGrammar(trigger=BEGIN, begin=f"{BEGIN}{tool.name}\n", end=END, separator="\n", parameters=parameters)

    def read_calls(self) -> Step[None]:
        source = self._source
        name, mark = yield from source.text_until(KEY, END)
        name = name.strip()
        self._begin(name)
        schemas = property_schemas(self._tools[name])
        separator = "{"
        while mark == KEY:
            key, _ = yield from source.text_until(KEY_END)
            key = key.strip()
            yield from source.text_until(VALUE)
            value, _ = yield from source.text_until(VALUE_END)
            key_text = json.dumps(key, ensure_ascii=False)
            self._arguments(f"{separator}{key_text}: {typed_value(value, schemas.get(key))}")
            separator = ", "
            _, mark = yield from source.text_until(KEY, END)
        self._arguments("{}" if separator == "{" else "}")
        self._end()

"""Hermes and Qwen: `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, once for each call."""

from __future__ import annotations

import json

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import Step
from brlite.chat.tools import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(ToolCallParser):
    """Also the format of models whose template does not support tools."""

    name = "hermes"
    marks = (BEGIN, END)
    call_mark = BEGIN

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        begin = f'{BEGIN}\n{{"name": {json.dumps(tool.name)}, "arguments": '
        return CallGrammar(trigger=BEGIN, begin=begin, end=f"}}\n{END}", separator="\n")

    def read_calls(self) -> Step[None]:
        yield from self._source.spaces()
        yield from self._json_call()
        yield from self._source.spaces()
        yield from self._source.take_end(END)  # some models omit it at the end of a reply

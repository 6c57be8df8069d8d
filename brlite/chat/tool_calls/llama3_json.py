"""Llama 3.1 to 3.3: the reply is `{"name": "f", "parameters": {...}}`, with or without `<|python_tag|>` before it.

A semicolon separates calls.
"""

from __future__ import annotations

import json

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import Step
from brlite.chat.tools import Tool

TAG = "<|python_tag|>"


class Llama3JsonParser(ToolCallParser):
    """Without the tag, a reply is a call only if it begins with an object."""

    name = "llama3_json"
    marks = (TAG,)

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        begin = f'{{"name": {json.dumps(tool.name)}, "parameters": '
        return CallGrammar(trigger=TAG, begin=begin, end="}", separator="; ", is_leading=True)

    def read_reply(self) -> Step[None]:
        source = self._source
        start = source.at
        yield from self._call(self._calls(is_leading=True), start, is_marked=False)
        while (yield from source.until((TAG,), self._content)):
            yield from self._call(self._calls(is_leading=False), source.at - len(TAG))

    def _calls(self, *, is_leading: bool) -> Step[None]:
        if is_leading:
            yield from self._expect_leading("{")
        yield from self._source.spaces()
        yield from self._json_call()
        yield from self._source.spaces()
        while (yield from self._source.take(";")):
            yield from self._source.spaces()
            yield from self._source.take(TAG)
            yield from self._source.spaces()
            if (yield from self._source.peek()) != "{":
                return
            yield from self._json_call()
            yield from self._source.spaces()

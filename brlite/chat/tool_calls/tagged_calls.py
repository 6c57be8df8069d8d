"""Calls in tags, with tags for each argument: Qwen3-Coder, Seed-OSS, MiniMax M2, GLM-4.5.

The formats differ in their texts only, which are the attributes of their classes. Strings are written without quotes,
so a parameter's schema decides whether its value is a string.
"""

from __future__ import annotations

import json
from typing import ClassVar

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser, is_string, property_schemas, typed_value
from brlite.chat.tool_calls.source import BrokenCall, Step
from brlite.chat.tools import Tool


class TaggedParser(ToolCallParser):
    """Calls `function NAME name_end`, then `parameter KEY key_end VALUE value_end` each, then `function_end`."""

    brackets = ("\n", "\n")
    separator = "\n"
    function: ClassVar[str] = "<function="
    name_end: ClassVar[str] = ">"
    function_end: ClassVar[str] = "</function>"
    parameter: ClassVar[str] = "<parameter="
    key_end: ClassVar[str] = ">"
    value_begin: ClassVar[str] = ""  # a tag of its own between key and value
    value_end: ClassVar[str] = "</parameter>"
    value_lines: ClassVar[str] = ""  # the line feed before and after a value

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        value_begin = f"\n{cls.value_begin}" if cls.value_begin else cls.value_lines
        parameters = {
            "begin": f"{cls.parameter}{{}}{cls.key_end}{value_begin}",
            "end": f"{cls.value_lines}{cls.value_end}\n",
            "has_plain_strings": True,
        }
        return cls.enclosed(f"{cls.function}{tool.name}{cls.name_end}\n", cls.function_end, parameters)

    def read_reply(self) -> Step[None]:
        # Some models leave the mark out. The grammar of calls requires it.
        marks = (self.call_mark,) if self._streams_arguments else (self.call_mark, self.function)
        while mark := (yield from self._source.until(marks, self._content)):
            yield from self._call(self._functions(mark), self._source.at - len(mark))

    def _functions(self, mark: str) -> Step[None]:
        source = self._source
        if mark == self.call_mark:
            yield from source.spaces()
            yield from source.expect(self.function)
        while True:
            name, _ = yield from source.text_until(self.name_end)
            self._begin(name.strip().strip('"'))
            yield from source.spaces()
            tag = yield from source.take(self.parameter, self.end_mark, self.function_end)
            yield from self._parameters(name.strip().strip('"'), tag)
            yield from source.spaces()
            if self.marks_each or not (yield from source.take(self.function)):
                break
        yield from source.take_end(self.end_mark)

    def _parameters(self, name: str, tag: str) -> Step[None]:
        """Read the parameters and the end of a call. `tag` is what was read last: that of a parameter, or the end."""
        source = self._source
        schemas = property_schemas(self._tools[name])
        separator = "{"
        while tag == self.parameter:
            key, _ = yield from source.text_until(self.key_end)
            key = key.strip().strip('"')
            if self.value_begin:
                yield from source.spaces()
                yield from source.expect(self.value_begin)
            self._arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            if self._streams_arguments and not is_string(schemas.get(key)):  # its strings may contain `value_end`
                yield from source.spaces()
                yield from source.json_value(self._arguments)
                yield from source.spaces()
                yield from source.expect(self.value_end)
            else:
                value, _ = yield from source.text_until(self.value_end)
                value = value.removeprefix(self.value_lines).removesuffix(self.value_lines)
                self._arguments(typed_value(value, schemas.get(key)))
            yield from source.spaces()
            tag = yield from source.take(self.parameter, self.end_mark, self.function_end)
        self._arguments("{}" if separator == "{" else "}")
        if not tag:
            raise BrokenCall(f"{self.function_end or self.end_mark!r} is missing")
        self._end()


class Qwen3CoderParser(TaggedParser):
    """Qwen3-Coder, Nemotron 3, Step 3.5: with line feeds around values."""

    name = "qwen3_coder"
    marks = ("<tool_call>", "</tool_call>")
    call_mark, end_mark = marks
    marks_each, value_lines = True, "\n"


class SeedOssParser(TaggedParser):
    """Seed-OSS."""

    name = "seed_oss"
    marks = ("<seed:tool_call>", "</seed:tool_call>")
    call_mark, end_mark = marks
    marks_each = True


class MiniMaxM2Parser(TaggedParser):
    """MiniMax M2: several calls between the marks."""

    name = "minimax_m2"
    marks = ("<minimax:tool_call>", "</minimax:tool_call>")
    call_mark, end_mark = marks
    function, name_end, function_end = '<invoke name="', '">', "</invoke>"
    parameter, key_end = '<parameter name="', '">'


class Glm4MoeParser(TaggedParser):
    """GLM-4.5 and later: `<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>`, on several lines."""

    name = "glm4_moe"
    call_mark, end_mark = "<tool_call>", "</tool_call>"
    brackets, marks_each = ("", ""), True
    function, name_end, function_end = "", "", ""
    parameter, key_end, value_begin, value_end = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
    marks = (call_mark, end_mark, parameter, key_end, value_begin, value_end)

    def read_reply(self) -> Step[None]:
        return ToolCallParser.read_reply(self)

    def read_calls(self) -> Step[None]:
        name, tag = yield from self._source.text_until(self.parameter, self.end_mark)
        self._begin(name.strip())
        yield from self._parameters(name.strip(), tag)

"""Calls as a tool's name and then its arguments, a JSON object, each between marks: DeepSeek, Kimi, Functionary.

The formats differ in their texts only, which are the attributes of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import Step
from brlite.chat.tools import Tool

FENCE = "```"


class NamedParser(ToolCallParser):
    """Calls `call_begin NAME name_end {...} call_end`. The arguments may be in a fence."""

    call_begin: ClassVar[str] = ""  # empty: `call_mark` begins each call
    name_end: ClassVar[str]
    call_end: ClassVar[str] = ""

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        return cls.enclosed(f"{cls.call_begin}{tool.name}{cls.name_end}", cls.call_end)

    def read_calls(self) -> Step[None]:
        source = self._source
        if self.call_begin:
            yield from source.spaces()
            yield from source.expect(self.call_begin)
        while True:
            self._begin((yield from self.read_name()))
            yield from source.spaces()
            if (yield from source.take(f"{FENCE}json", FENCE)):
                yield from source.spaces()
            yield from self._json_arguments()
            self._end()
            yield from source.spaces()
            if (yield from source.take(FENCE)):
                yield from source.spaces()
            if self.call_end:
                yield from source.take_end(self.call_end)
                yield from source.spaces()
            if not self.call_begin or not (yield from source.take(self.call_begin)):
                break
        yield from source.take_end(self.end_mark)

    def read_name(self) -> Step[str]:
        """Read the name and the text between it and the arguments."""
        name, _ = yield from self._source.text_until(self.name_end)
        return name.strip()


class FunctionaryParser(NamedParser):
    """Functionary 3.1, and Llama 3.1 with tools of its users: `<function=f>{...}</function>`."""

    name = "functionary"
    marks = ("<function=", "</function>")
    call_mark, end_mark = marks
    name_end = ">"
    marks_each = True


class DeepSeekV31Parser(NamedParser):
    """DeepSeek V3.1: the name, `<｜tool▁sep｜>` and the arguments."""

    name = "deepseek_v31"
    call_mark, end_mark = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call_begin, name_end, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    marks = (call_mark, end_mark, call_begin, name_end, call_end)

    def read_name(self) -> Step[str]:
        name = yield from super().read_name()
        if name == "function":  # in V3 and R1 the name follows
            name, _ = yield from self._source.text_until("\n")
        return name.strip()


class DeepSeekParser(DeepSeekV31Parser):
    """DeepSeek V3 and R1: the word `function`, `<｜tool▁sep｜>`, the name, and the arguments in a fence."""

    name = "deepseek"
    separator = "\n"

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        begin = f"{cls.call_begin}function{cls.name_end}{tool.name}\n{FENCE}json\n"
        return cls.enclosed(begin, f"\n{FENCE}{cls.call_end}")


class KimiParser(NamedParser):
    """Kimi K2: the name stands in an id, `functions.f:0`. The number counts the calls.

    Numbers are ignored. A grammar writes one call a reply, because it cannot count.
    """

    name = "kimi"
    call_mark, end_mark = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    call_begin, name_end, call_end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    marks = (call_mark, end_mark, call_begin, name_end, call_end)
    prefix: ClassVar[str] = "functions."
    is_single = True

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        return cls.enclosed(f"{cls.call_begin}{cls.prefix}{tool.name}:0{cls.name_end}", cls.call_end)

    @classmethod
    def write(cls, calls: Sequence[tuple[str, str]]) -> list[str]:
        pieces = [cls.call_mark]
        for index, (name, arguments) in enumerate(calls):
            pieces[-1] += f"{cls.call_begin}{cls.prefix}{name}:{index}{cls.name_end}"
            pieces += [arguments, cls.call_end]
        pieces[-1] += cls.end_mark
        return pieces

    def read_name(self) -> Step[str]:
        call_id = yield from super().read_name()
        return call_id.removeprefix(self.prefix).rpartition(":")[0]

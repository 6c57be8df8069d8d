"""Kimi K2: calls between `<|tool_calls_section_begin|>` and `<|tool_calls_section_end|>`.

A call is `<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`. The number counts the
calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import Step
from brlite.chat.tools import Tool

CALLS, CALLS_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
PREFIX = "functions."


class KimiParser(ToolCallParser):
    """The numbers of calls are ignored. A grammar writes one call a reply, because it cannot count."""

    name = "kimi"
    marks = (CALLS, CALLS_END, CALL, ARGUMENTS, CALL_END)
    call_mark = CALLS

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        begin = f"{CALLS}{CALL}{PREFIX}{tool.name}:0{ARGUMENTS}"
        return CallGrammar(trigger=CALLS, begin=begin, end=f"{CALL_END}{CALLS_END}", is_single=True)

    @classmethod
    def write(cls, calls: Sequence[tuple[str, str]]) -> list[str]:
        pieces = [CALLS]
        for index, (name, arguments) in enumerate(calls):
            pieces[-1] += f"{CALL}{PREFIX}{name}:{index}{ARGUMENTS}"
            pieces += [arguments, CALL_END]
        pieces[-1] += CALLS_END
        return pieces

    def read_calls(self) -> Step[None]:
        source = self._source
        yield from source.spaces()
        yield from source.expect(CALL)
        while True:
            call_id, _ = yield from source.text_until(ARGUMENTS)
            self._begin(call_id.strip().removeprefix(PREFIX).rpartition(":")[0])
            yield from source.spaces()
            yield from self._json_arguments()
            self._end()
            yield from source.spaces()
            yield from source.take_end(CALL_END)
            yield from source.spaces()
            if not (yield from source.take(CALL)):
                break
        yield from source.take_end(CALLS_END)

"""DeepSeek V3, R1 and V3.1: calls between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.

A call of V3.1 is the name, `<｜tool▁sep｜>` and the arguments. In V3 and R1 it is the word `function`,
`<｜tool▁sep｜>`, the name, and the arguments in a fence.
"""

from __future__ import annotations

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import Step
from brlite.chat.tools import Tool

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"


class DeepSeekParser(ToolCallParser):
    """The format of V3 and R1. Calls in V3.1's format are read as well."""

    name = "deepseek"
    marks = (CALLS, CALLS_END, CALL, SEPARATOR, CALL_END)
    call_mark = CALLS

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        begin = f"{CALL}function{SEPARATOR}{tool.name}\n{FENCE}json\n"
        end = f"\n{FENCE}{CALL_END}"
        return CallGrammar(trigger=CALLS, opening=CALLS, begin=begin, end=end, separator="\n", closing=CALLS_END)

    def read_calls(self) -> Step[None]:
        source = self._source
        yield from source.spaces()
        yield from source.expect(CALL)
        while True:
            name, _ = yield from source.text_until(SEPARATOR)
            if name.strip() == "function":  # in V3 and R1 the name follows
                name, _ = yield from source.text_until("\n")
            self._begin(name.strip())
            yield from source.spaces()
            if (yield from source.take(f"{FENCE}json", FENCE)):
                yield from source.spaces()
            yield from self._json_arguments()
            self._end()
            yield from source.spaces()
            if (yield from source.take(FENCE)):
                yield from source.spaces()
            yield from source.take_end(CALL_END)
            yield from source.spaces()
            if not (yield from source.take(CALL)):
                break
        yield from source.take_end(CALLS_END)


class DeepSeekV31Parser(DeepSeekParser):
    """The format of V3.1. Only the grammar of a call differs."""

    name = "deepseek_v31"

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        begin = f"{CALL}{tool.name}{SEPARATOR}"
        return CallGrammar(trigger=CALLS, opening=CALLS, begin=begin, end=CALL_END, closing=CALLS_END)

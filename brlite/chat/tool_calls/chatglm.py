"""ChatGLM3, GLM-4 and Functionary 3.2: the first line of the reply is a tool's name, and the arguments follow.

They are a JSON object; ChatGLM3 writes the code ``tool_call(a=1)`` in a fence.
"""

from __future__ import annotations

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.pythonic import keyword_arguments
from brlite.chat.tool_calls.source import BrokenCall, Step
from brlite.chat.tools import Tool

FENCE = "```"


class ChatGlmParser(ToolCallParser):
    """If the first line is not a tool's name, it is plain text. `separator` stands before each further call."""

    name = "chatglm"
    marks = ("<|assistant|>",)
    separator = marks[0]
    is_leading = True

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        return cls.enclosed(f"{tool.name}\n", "")

    def read_reply(self) -> Step[None]:
        yield from self._call(self._named(), self._source.at, is_marked=False)
        while (yield from self._source.until((self.separator,), self._content)):
            yield from self._call(self._named(), self._source.at - len(self.separator), is_marked=False)

    def _named(self) -> Step[None]:
        source = self._source
        yield from source.spaces()
        if not self._tools:
            raise BrokenCall("there are no tools")
        line = yield from source.expect(*(f"{name}\n" for name in self._tools), *(f"{name} \n" for name in self._tools))
        yield from source.spaces()
        if (yield from source.take(FENCE)):
            yield from source.text_until("tool_call(")
            self._begin(line.strip())
            yield from keyword_arguments(source, self._arguments)
            self._end()
            yield from source.spaces()
            yield from source.take_end(FENCE)
            return
        if (yield from source.peek()) != "{":
            raise BrokenCall("it is plain text")
        self._begin(line.strip())
        yield from self._json_arguments()
        self._end()


class Functionary32Parser(ChatGlmParser):
    """Functionary 3.2. Text follows the name `all`. The mark before the first name ends the prompt."""

    name = "functionary_32"
    marks = (">>>",)
    call_mark = separator = marks[0]

    def read_reply(self) -> Step[None]:
        yield from self._source.take("all\n")
        yield from super().read_reply()

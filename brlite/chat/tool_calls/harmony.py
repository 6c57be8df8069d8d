"""gpt-oss: a reply is messages, each with a channel: `analysis` is reasoning, `final` is content.

A message `to=functions.f` is a call: `<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>`.
"""

from __future__ import annotations

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import BrokenCall, Step
from brlite.chat.tools import ReasoningDelta, Tool

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
RECIPIENT = "functions."
# A preamble may come before the answer. These are the texts that begin it, that end it, and that begin the answer.
PREAMBLES = (f"{CHANNEL}analysis{MESSAGE}", f"{CHANNEL}commentary{MESSAGE}")
PREAMBLE_END, FINAL = f"{ENDS[0]}{START}assistant", f"{CHANNEL}final{MESSAGE}"


class HarmonyParser(ToolCallParser):
    """Parses content and reasoning too. The prompt ends with `<|start|>assistant`."""

    name = "harmony"
    marks = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
    call_mark, marks_each, is_single = CHANNEL, True, True  # `<|call|>` ends a reply

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        return cls.enclosed(f"commentary to={RECIPIENT}{tool.name} {CONSTRAIN}json{MESSAGE}", "")

    def read_reply(self) -> Step[None]:
        source = self._source
        while True:
            self._start = self._passed_on = source.at  # keep the header: without an end it is content
            header: list[str] = []
            mark = yield from source.until((MESSAGE, *ENDS), header.append)
            start, self._start = self._start, None
            if not mark:
                self._content("".join(header).removeprefix(START).removeprefix("assistant"))
                return
            if mark != MESSAGE:
                continue
            words = "".join(header).replace(CONSTRAIN, " ").replace(CHANNEL, f" {CHANNEL}").split()
            channel = next((word.removeprefix(CHANNEL) for word in words if word.startswith(CHANNEL)), "final")
            recipient = next((word.removeprefix("to=") for word in words if word.startswith("to=")), "")
            if recipient.startswith(RECIPIENT) and (
                yield from self._call(self._arguments_of(recipient.removeprefix(RECIPIENT)), start)
            ):
                continue
            is_reasoning = channel == "analysis"
            emit = (lambda text: self._events.append(ReasoningDelta(text))) if is_reasoning else self._content
            yield from source.until((*ENDS, START), emit)

    def _arguments_of(self, name: str) -> Step[None]:
        self._begin(name)
        yield from self._source.spaces()
        yield from self._json_arguments()
        self._end()
        yield from self._source.spaces()
        if not (yield from self._source.take(*ENDS)) and (yield from self._source.peek()):
            raise BrokenCall(f"{ENDS[1]!r} is missing")

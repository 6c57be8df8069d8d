"""Parses a model's reply incrementally into events: reasoning, content and tool calls. Uses text only, no tokens."""

from __future__ import annotations

import msgspec

from brlite.chat.formats import ChatFormat
from brlite.chat.reasoning import REASONING_MARKS, Marks, ReasoningSplitter
from brlite.chat.tool_calls import PARSERS, ToolCallParser, find_parser
from brlite.chat.tools import ReasoningDelta, ReplyEvent, TextDelta, ToolCallDelta


class ReplyFormat(msgspec.Struct, frozen=True):
    """The format of a model's replies: the parser of its calls, and the marks of its reasoning."""

    calls: type[ToolCallParser] | None
    marks: Marks | None

    @property
    def reads_all(self) -> bool:
        """Whether every reply must be parsed, because the format marks content too."""
        return self.calls is PARSERS["harmony"]


def find_reply_format(chat_format: ChatFormat, tool_parser: str, reasoning_parser: str) -> ReplyFormat:
    """The format that the options `tool_parser` and `reasoning_parser` name.

    `auto` finds it from the chat template, `none` leaves the text unchanged. If the template has no tools, or writes
    calls in an unknown format, `auto` takes Hermes' format.
    """
    calls: type[ToolCallParser] | None = None
    if tool_parser in PARSERS:
        calls = PARSERS[tool_parser]
    elif tool_parser == "auto":
        calls = PARSERS["hermes"]
        if chat_format.tool_parser is not None:
            calls = PARSERS[chat_format.tool_parser]
        elif chat_format.capabilities.knows_tools or chat_format.capabilities.marks_content:
            calls = find_parser(chat_format.text or "") or calls
    marks = REASONING_MARKS.get(reasoning_parser)
    if reasoning_parser == "auto" and calls is not PARSERS["harmony"]:
        marks = chat_format.capabilities.reasoning_marks
    return ReplyFormat(calls, marks)


class ReplyParser:
    """Parses one reply. `marks` are the model's reasoning marks, `calls` parses tool calls; None: the reply has none.

    The joined events do not depend on how the text is cut.
    """

    def __init__(
        self,
        *,
        marks: tuple[str, str] | None = None,
        begins_inside: bool = False,
        calls: ToolCallParser | None = None,
    ) -> None:
        self._calls = calls
        self._warnings: list[str] = []
        self._events: list[ReplyEvent] = []
        self._splitter = None
        if marks is not None:
            self._splitter = ReasoningSplitter(
                marks,
                lambda text: self._events.append(ReasoningDelta(text)),
                self._content,
                begins_inside=begins_inside,
            )

    @property
    def warnings(self) -> list[str]:
        """A warning for each text that looked like a call, or like the beginning of one, but is passed on as
        content."""
        return self._warnings if self._calls is None else [*self._warnings, *self._calls.warnings]

    @property
    def has_calls(self) -> bool:
        """Whether there are tool calls so far, all of them whole."""
        return self._calls is not None and self._calls.num_calls > 0 and not self._calls.is_broken

    def feed(self, text: str) -> list[ReplyEvent]:
        """The events that this text completes."""
        if self._splitter is None:
            self._content(text)
        else:
            self._splitter.feed(text)
        return self._take()

    def finish(self, *, is_cut: bool = False) -> list[ReplyEvent]:
        """End the reply: the events of the text that was held back. `is_cut`: it ended at its length limit.

        An incomplete mark at a cut is content, as in vLLM, with a warning.
        """
        if self._splitter is not None:
            if is_cut and (held := self._splitter.held):
                self._warnings.append(f"the reply was cut in {held!r}, which may begin its reasoning: it is content")
            self._splitter.finish()
        if self._calls is not None:
            self._events += self._calls.finish(is_cut=is_cut)
        return self._take()

    def _content(self, text: str) -> None:
        if self._calls is not None:
            self._events += self._calls.feed(text)
        elif text:
            self._events.append(TextDelta(text))

    def _take(self) -> list[ReplyEvent]:
        """The events since the last call, with adjacent pieces of the same kind joined."""
        events, self._events = self._events, []
        merged: list[ReplyEvent] = []
        for event in events:
            last = merged[-1] if merged else None
            if isinstance(event, TextDelta) and isinstance(last, TextDelta):
                merged[-1] = TextDelta(last.text + event.text)
            elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
                merged[-1] = ReasoningDelta(last.text + event.text)
            elif isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta) and not (event.id or last.id):
                merged[-1] = ToolCallDelta(last.index, last.arguments + event.arguments)
            else:
                merged.append(event)
        return merged

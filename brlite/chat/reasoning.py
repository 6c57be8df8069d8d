"""Splits a reply into reasoning and content, incrementally, by the marks that a model's template uses."""

from __future__ import annotations

import re
from collections.abc import Callable

from brlite.chat.tool_calls.source import ReplySource, Step

Marks = tuple[str, str]  # the texts that begin and end reasoning

# By name in the config. If a template has several, the first is used.
REASONING_MARKS: dict[str, Marks] = {
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed": ("<seed:think>", "</seed:think>"),
    "command": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "kimi": ("◁think▷", "◁/think▷"),
    "reasoning": ("<reasoning>", "</reasoning>"),
}
# Keys of an assistant turn that templates read its reasoning from. The first that a template reads is used.
_KEYS = ("reasoning_content", "thinking", "reasoning")


def find_reasoning_marks(template: str) -> Marks | None:
    """The marks that a chat template uses; None for a model without reasoning."""
    return next((marks for marks in REASONING_MARKS.values() if marks[1] in template), None)


def find_reasoning_key(template: str) -> str | None:
    """The key of a turn that a template reads its reasoning from; None if it reads none."""
    return next((key for key in _KEYS if re.search(rf"\w\.{key}\b|['\"]{key}['\"]", template)), None)


def ends_inside(prompt_end: str, marks: Marks) -> bool:
    """Whether a prompt that ends with this text opens the reasoning, so that the reply begins inside it."""
    return prompt_end.rstrip().endswith(marks[0])


class ReasoningSplitter:
    """Passes on pieces of reasoning and of content. The joined pieces do not depend on how the text is cut.

    Only the beginning of a reply can be reasoning. Without an end mark, all of the rest is reasoning. White space at
    the start and end of reasoning is left out.
    """

    def __init__(
        self,
        marks: Marks,
        on_reasoning: Callable[[str], object],
        on_content: Callable[[str], object],
        *,
        begins_inside: bool,
    ) -> None:
        self.is_inside = begins_inside
        self._start, self._end = marks
        self._on_reasoning = on_reasoning
        self._on_content = on_content
        self._spaces = ""  # white space of the reasoning, held until text follows
        self._has_reasoning = False
        self._source = ReplySource()
        self._splitting = self._split()
        next(self._splitting, None)

    def feed(self, text: str) -> None:
        self._source.feed(text, self._source.at)
        next(self._splitting, None)

    @property
    def held(self) -> str:
        """Text that may be the beginning of the mark that begins reasoning."""
        return "" if self.is_inside else self._source.text[self._source.at :]

    def finish(self) -> None:
        """End the reply: pass on the text that was held back."""
        self._source.has_ended = True
        next(self._splitting, None)

    def _split(self) -> Step[None]:
        source = self._source
        spaces: list[str] = []
        while (character := (yield from source.peek())).isspace():
            spaces.append(character)
            source.at += 1
        if (yield from source.take(self._start)):  # some models repeat the mark of the prompt
            self.is_inside = True
        if self.is_inside:
            yield from source.until((self._end,), self._reasoning)
            self.is_inside = False
            yield from source.spaces()
        else:
            self._on_content("".join(spaces))
        while True:
            text, source.at = source.text[source.at :], len(source.text)
            if text:
                self._on_content(text)
            if not (yield from source.more()):
                return

    def _reasoning(self, text: str) -> None:
        if not self._has_reasoning:
            text = text.lstrip()
        kept = text.rstrip()
        if kept:
            self._on_reasoning(self._spaces + kept)
            self._spaces, self._has_reasoning = "", True
        self._spaces += text[len(kept) :]


class ReasoningTokenCounter:
    """Counts the tokens of a reply's reasoning, including its marks. Finds the marks in the tokens' bytes.

    Reasoning begins at the beginning of the reply. With `several` there may be many parts of it, anywhere.
    """

    def __init__(self, marks: Marks, *, begins_inside: bool, several: bool = False) -> None:
        self.num_tokens = 0
        self._begin, self._end = (mark.encode() for mark in marks)
        self._several = several
        self._is_inside = begins_inside
        self._is_over = False
        self._tokens: list[bytes] = []  # the last ones, which may be part of a mark

    def feed(self, token: bytes) -> None:
        """Add the next token of the reply."""
        if self._is_over:
            return
        self._tokens.append(token)
        text = b"".join(self._tokens)
        if self._is_inside:
            self.num_tokens += 1
            if self._end in text:
                self._is_inside, self._is_over, self._tokens = False, not self._several, []
        elif (start := text.find(self._begin)) >= 0 and (self._several or not text[:start].strip()):
            place = len(text)
            while place > start:
                place -= len(self._tokens.pop())
                self.num_tokens += 1
            self._is_inside, self._tokens = True, []
        elif not self._several and not self._begin.startswith(text.lstrip()):
            self._is_over = True
        while len(text) - len(self._tokens[0] if self._tokens else text) > max(len(self._begin), len(self._end)):
            text = text[len(self._tokens.pop(0)) :]

"""Reads text that arrives in pieces, for parsers written as if the text were complete.

A parser is a generator. It yields when it needs more text, and is resumed when there is more. Its result does not
depend on how the text was cut into pieces. No text is read twice, so the time is linear in its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Step = Generator[None, None, T]  # a step of a parser: yields while it waits, returns its result
Emit = Callable[[str], object]

MAX_DEPTH = 64  # nested arrays and objects of one call's arguments
_SPACES = re.compile(r"\s*")
_BRACKETS_AND_QUOTES = re.compile(r'[{}\[\]"]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')
_SCALAR = re.compile(r"[-+.\w]*")
_OPENING = {"}": "{", "]": "["}


class BrokenCall(Exception):
    """The text begins like a call but is not one. The message has the reason."""


class ReplySource:
    """The text so far, without the forgotten beginning. `at` is the index of the next character to read."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.has_ended = False

    def feed(self, text: str, keep_from: int) -> int:
        """Append text and forget the text before `keep_from`. Returns the number of characters forgotten."""
        self.text = self.text[keep_from:] + text
        self.at -= keep_from
        return keep_from

    def more(self) -> Step[bool]:
        """Wait for more text. False if it has ended."""
        if self.has_ended:
            return False
        yield
        return True

    def peek(self) -> Step[str]:
        """The next character, without consuming it; empty at the end."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def spaces(self) -> Step[None]:
        """Consume white space."""
        while True:
            match = _SPACES.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not (yield from self.more()):
                return

    def take(self, *words: str) -> Step[str]:
        """If one of the words comes next, consume and return it, else an empty string. Earlier words have priority."""
        while True:
            rest = self.text[self.at : self.at + max(map(len, words))]
            found = next((word for word in words if rest.startswith(word)), "")
            is_open = any(len(word) > max(len(rest), len(found)) and word.startswith(rest) for word in words)
            if not is_open or not (yield from self.more()):
                self.at += len(found)
                return found

    def take_end(self, mark: str) -> Step[None]:
        """Consume the mark at the end of a call if it comes next. At the end of the text, a part of it is consumed
        too."""
        found = yield from self.take(mark)
        rest = self.text[self.at :]
        if self.has_ended and not found and mark.startswith(rest):
            self.at += len(rest)

    def expect(self, *words: str) -> Step[str]:
        """As `take`. Raises `BrokenCall` if none of the words comes next."""
        word = yield from self.take(*words)
        if not word:
            raise BrokenCall(f"{words[0]!r} is missing")
        return word

    def until(self, marks: Sequence[str], emit: Emit) -> Step[str]:
        """Read up to the first mark and consume it. Returns the mark; empty at the end.

        The text before it is given to `emit` as soon as it cannot be the beginning of a mark. If several marks match,
        the longest is consumed.
        """
        starts = re.compile("[" + re.escape("".join({mark[0] for mark in marks})) + "]")
        longest = max(map(len, marks))
        while True:
            match = starts.search(self.text, self.at)
            place = match.start() if match else len(self.text)
            self._copy(place, emit)
            if place == len(self.text):
                if not (yield from self.more()):
                    return ""
                continue
            rest = self.text[place : place + longest]
            found = max((mark for mark in marks if rest.startswith(mark)), key=len, default="")
            if any(len(mark) > max(len(rest), len(found)) and mark.startswith(rest) for mark in marks) and (
                yield from self.more()
            ):
                continue
            if found:
                self.at += len(found)
                return found
            self._copy(place + 1, emit)

    def text_until(self, *marks: str) -> Step[tuple[str, str]]:
        """Read the text up to the first mark, and consume the mark. Returns both. Raises `BrokenCall` without a
        mark."""
        pieces: list[str] = []
        mark = yield from self.until(marks, pieces.append)
        if not mark:
            raise BrokenCall(f"{marks[0]!r} is missing")
        return "".join(pieces), mark

    def json_string(self) -> Step[str]:
        """Read a JSON string. Returns its value. Raises `BrokenCall`."""
        pieces: list[str] = []
        yield from self.json_value(pieces.append)
        value = parse_json("".join(pieces))
        if not isinstance(value, str):
            raise BrokenCall("a string is missing")
        return value

    def json_value(self, emit: Emit) -> Step[None]:
        """Read one JSON value and give its text to `emit` as it arrives. Raises `BrokenCall` if it does not end.

        Only brackets and quotes are checked here. `parse_json` checks the rest.
        """
        first = yield from self.peek()
        if first == '"':
            yield from self._string(emit)
        elif first and first in "{[":
            yield from self._brackets(emit)
        else:
            while True:
                match = _SCALAR.match(self.text, self.at)
                if match:
                    self._copy(match.end(), emit)
                if self.at < len(self.text) or not (yield from self.more()):
                    return

    def _brackets(self, emit: Emit) -> Step[None]:
        stack: list[str] = []
        while True:
            match = _BRACKETS_AND_QUOTES.search(self.text, self.at)
            if match is None:
                yield from self._rest(emit)
                continue
            if match[0] == '"':
                self._copy(match.start(), emit)
                yield from self._string(emit)
                continue
            self._copy(match.end(), emit)
            if match[0] in "{[":
                stack.append(match[0])
                if len(stack) > MAX_DEPTH:
                    raise BrokenCall(f"it is nested deeper than {MAX_DEPTH} levels")
            elif stack.pop() != _OPENING[match[0]]:
                raise BrokenCall("its brackets do not match")
            if not stack:
                return

    def _string(self, emit: Emit) -> Step[None]:
        self._copy(self.at + 1, emit)
        while True:
            match = _QUOTE_OR_ESCAPE.search(self.text, self.at)
            if match is None:
                yield from self._rest(emit)
                continue
            if match[0] == '"':
                self._copy(match.end(), emit)
                return
            self._copy(match.start(), emit)
            while self.at + 2 > len(self.text):
                if not (yield from self.more()):
                    raise BrokenCall("it is cut off")
            self._copy(self.at + 2, emit)

    def _copy(self, end: int, emit: Emit) -> None:
        if end > self.at:
            start, self.at = self.at, end
            emit(self.text[start:end])

    def _rest(self, emit: Emit) -> Step[None]:
        self._copy(len(self.text), emit)
        if not (yield from self.more()):
            raise BrokenCall("it is cut off")


def parse_json(text: str) -> object:
    """The value of a JSON text. Raises `BrokenCall` if it is invalid, or has NaN or Infinity."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BrokenCall(f"it is not JSON: {error}") from None


def is_text(text: str) -> bool:
    """Whether UTF-8 can encode the text: a string of JSON or Python may have half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number")

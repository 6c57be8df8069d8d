"""Llama 3.2 and 4, LFM2, Olmo 3: Python calls, `[f(a=1, b="x"), g()]`. Arguments are literals; nothing is evaluated."""

from __future__ import annotations

import json
import re
import string
import sys

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import MAX_DEPTH, BrokenCall, Emit, ReplySource, Step, is_text
from brlite.chat.tools import Tool

_WORD = re.compile(r"[\w.+-]*")
_CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_CLOSING = {"[": "]", "(": ")", "{": "}"}


class PythonicParser(ToolCallParser):
    """Without the mark, a reply has calls only if it begins with such a list."""

    name = "pythonic"
    marks = ("<|python_start|>", "<|python_end|>")
    call_mark, end_mark = marks
    brackets, separator = ("[", "]"), ", "
    is_leading = True

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar | None:
        if _WORD.fullmatch(tool.name) is None:
            return None
        parameters = {"begin": "{}=", "separator": ", ", "has_python_constants": True}
        return cls.enclosed(f"{tool.name}(", ")", parameters)

    def read_calls(self) -> Step[None]:
        source = self._source
        yield from source.spaces()
        is_list = self.brackets[0] == "["
        if is_list:
            yield from source.expect("[")
        while True:
            yield from source.spaces()
            name = yield from word(source)
            yield from source.spaces()
            yield from source.expect("(")
            self._begin(name)
            yield from keyword_arguments(source, self._arguments)
            self._end()
            yield from source.spaces()
            if is_list and not (yield from source.take(",")):
                break
            if not is_list and (yield from source.peek()) in ("", self.end_mark[0]):
                break
        if is_list:
            yield from source.expect("]")
            yield from source.spaces()
        yield from source.take_end(self.end_mark)


class Lfm2Parser(PythonicParser):
    """LFM2: the list between marks, anywhere in a reply."""

    name = "lfm2"
    marks = ("<|tool_call_start|>", "<|tool_call_end|>")
    call_mark, end_mark = marks
    is_leading = False


class Olmo3Parser(PythonicParser):
    """Olmo 3: a line for each call, between marks."""

    name = "olmo3"
    marks = ("<function_calls>", "</function_calls>")
    call_mark, end_mark = marks
    brackets, separator, is_leading = ("\n", "\n"), "\n", False


def word(source: ReplySource) -> Step[str]:
    """Read a name, a number or a constant: letters, digits and `_.+-`."""
    pieces: list[str] = []
    while True:
        match = _WORD.match(source.text, source.at)
        if match and match[0]:
            pieces.append(match[0])
            source.at = match.end()
        if source.at < len(source.text) or not (yield from source.more()):
            return "".join(pieces)


def keyword_arguments(source: ReplySource, emit: Emit) -> Step[None]:
    """Read `a=1, b="x")` and emit it as a JSON object. Raises `BrokenCall`."""
    separator = "{"
    yield from source.spaces()
    while not (yield from source.take(")")):
        key = yield from word(source)
        yield from source.spaces()
        yield from source.expect("=")
        emit(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        yield from _literal(source, emit, MAX_DEPTH)
        separator = ", "
        yield from source.spaces()
        if not (yield from source.take(",")):
            yield from source.expect(")")
            break
        yield from source.spaces()
    emit("{}" if separator == "{" else "}")


def _literal(source: ReplySource, emit: Emit, depth: int) -> Step[None]:
    """Read one literal and emit it as JSON."""
    yield from source.spaces()
    first = yield from source.peek()
    if depth == 0:
        raise BrokenCall(f"it is nested deeper than {MAX_DEPTH} levels")
    if first in _CLOSING:
        yield from _collection(source, emit, depth - 1)
    elif first and first in "\"'":
        emit((yield from _string(source)))
    else:
        text = yield from word(source)
        if text not in _CONSTANTS and not _NUMBER.fullmatch(text):
            raise BrokenCall("a literal is missing")
        emit(_CONSTANTS.get(text, text))


def _collection(source: ReplySource, emit: Emit, depth: int) -> Step[None]:
    """Read a list, a tuple or a dictionary and emit it as JSON."""
    opening = yield from source.expect(*_CLOSING)
    closing, is_mapping = _CLOSING[opening], opening == "{"
    before = begin = "{" if is_mapping else "["
    yield from source.spaces()
    while not (yield from source.take(closing)):
        emit(before)
        before = ", "
        if is_mapping:
            if (yield from source.peek()) not in ('"', "'"):
                raise BrokenCall("a key is no string")
            emit((yield from _string(source)))
            yield from source.spaces()
            yield from source.expect(":")
            emit(": ")
        yield from _literal(source, emit, depth)
        yield from source.spaces()
        if not (yield from source.take(",")):
            yield from source.expect(closing)
            break
        yield from source.spaces()
    end = "}" if is_mapping else "]"
    emit(begin + end if before == begin else end)


def _string(source: ReplySource) -> Step[str]:
    """Read a string in single or double quotes. Returns it as JSON."""
    quote = yield from source.expect('"', "'")
    pieces: list[str] = []
    while True:
        mark = yield from source.until((quote, "\\"), pieces.append)
        if mark == quote:
            text = "".join(pieces)
            return json.dumps(text, ensure_ascii=not is_text(text))  # escaped, the halves of a pair are one character
        escaped = (yield from source.peek()) if mark else ""
        if not escaped:
            raise BrokenCall("it is cut off")
        source.at += 1
        if escaped not in _HEX_DIGITS:
            pieces.append(_ESCAPES.get(escaped, escaped if escaped in "\\'\"" else "\\" + escaped))
            continue
        digits = ""
        while len(digits) < _HEX_DIGITS[escaped]:
            digit = yield from source.peek()
            if not digit or digit not in string.hexdigits:
                raise BrokenCall("an escape in a string is broken")
            digits += digit
            source.at += 1
        if int(digits, 16) > sys.maxunicode:
            raise BrokenCall("an escape in a string is broken")
        pieces.append(chr(int(digits, 16)))

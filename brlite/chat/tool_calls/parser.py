"""The base class of the parsers of all formats: content between calls, the events of a call, warnings.

A format's parser reads a `ReplySource` and calls `_begin`, `_arguments` and `_end`. It raises `BrokenCall` if the text
is not a call; the text is then passed on as content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from brlite.chat.tool_calls.source import BrokenCall, ReplySource, Step, is_text, parse_json
from brlite.chat.tools import ReplyEvent, TextDelta, Tool, ToolCallDelta, ToolCallEnd, new_call_id
from brlite.files.quoting import excerpt

# The types of JSON schemas that a decoded value may have.
_TYPES: dict[type, tuple[str, ...]] = {
    type(None): ("null",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("integer", "number"),
    list: ("array",),
    dict: ("object",),
}
MAX_WARNINGS = 16  # of a reply, which may have a broken call in each of its tokens


class CallGrammar(msgspec.Struct, frozen=True, kw_only=True):
    """The text around a tool's calls, for the grammar of a reply.

    Several calls are written as `opening`, the calls with `separator` between them, `closing`. A call is `begin`, its
    arguments and `end`. Arguments are a JSON object by the tool's schema. With `parameters`, the fields of a
    `ParameterNotation`, they are written one by one.

    `trigger` begins calls in free text. With `is_leading`, calls at the beginning of a reply need no trigger; elsewhere
    the trigger precedes `opening`. With `is_single` a reply has at most one call.
    """

    trigger: str
    begin: str
    end: str
    opening: str = ""
    separator: str = ""
    closing: str = ""
    is_leading: bool = False
    is_single: bool = False
    parameters: Mapping[str, Any] | None = None


class ToolCallParser:
    """Reads one reply. Its events do not depend on how the text is cut into pieces.

    The events of a call are held until the call is complete, because an invalid call is passed on as content. With
    `streams_arguments`, for replies that a grammar constrains, they are passed on at once.
    """

    name: ClassVar[str]
    # Texts that mark calls. One that is a special token of the vocabulary must be kept in the text.
    marks: ClassVar[tuple[str, ...]] = ()
    has_short_ids: ClassVar[bool] = False
    # Calls are `call_mark`, the opening bracket, the calls with `separator` between them, the closing bracket,
    # `end_mark`. With `marks_each`, marks and brackets enclose each call. With `is_leading`, calls at the beginning of
    # a reply have no marks.
    call_mark: ClassVar[str] = ""
    end_mark: ClassVar[str] = ""
    brackets: ClassVar[tuple[str, str]] = ("", "")
    separator: ClassVar[str] = ""
    marks_each: ClassVar[bool] = False
    is_leading: ClassVar[bool] = False
    is_single: ClassVar[bool] = False  # a reply has at most one call

    def __init__(self, tools: Sequence[Tool], *, max_calls: int = 2**31, streams_arguments: bool = False) -> None:
        """`tools` may be called. Further calls after `max_calls` are passed on as content."""
        self.warnings: list[str] = []
        self._tools = {tool.name: tool for tool in tools}
        self._max_calls = max_calls
        self._streams_arguments = streams_arguments
        self._source = ReplySource()
        self._events: list[ReplyEvent] = []
        self.num_calls = 0
        self.is_broken = False  # a call whose beginning was passed on does not parse
        self._is_cut = False
        self._spaces = ""  # white space of the content, held until text follows
        self._has_content = False
        # State of the current call:
        self._start: int | None = None  # where it begins in the source; None between calls
        self._has_begun = False  # an event of it was passed on
        self._passed_on = 0  # its text before this index of the source was passed on
        self._call_events: list[ReplyEvent] = []  # held until the call is complete
        self._text: list[str] = []  # its arguments
        self._parsing = self.read_reply()
        next(self._parsing, None)

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar | None:
        """The grammar of a call of this tool. None if the format cannot express it."""
        raise NotImplementedError

    @classmethod
    def enclosed(cls, begin: str, end: str, parameters: Mapping[str, Any] | None = None) -> CallGrammar:
        """The grammar of calls that `begin` and `end` enclose, within the marks and brackets of the class."""
        opening, closing = cls.brackets
        if not cls.is_leading:
            opening, closing = cls.call_mark + opening, closing + cls.end_mark
        if cls.marks_each:
            begin, end, opening, closing = opening + begin, end + closing, "", ""
        return CallGrammar(
            trigger=cls.call_mark,
            begin=begin,
            end=end,
            opening=opening,
            separator=cls.separator,
            closing=closing,
            is_leading=cls.is_leading,
            is_single=cls.is_single,
            parameters=parameters,
        )

    @classmethod
    def write(cls, calls: Sequence[tuple[str, str]]) -> list[str] | None:
        """The calls, given as (name, JSON text of the arguments), as the model writes them. None if it cannot.

        The pieces with even indices are the format's text and names of tools, the others are arguments.
        """
        pieces = [""]
        for index, (name, arguments) in enumerate(calls):
            grammar = cls.grammar(Tool(name=name))
            if grammar is None:
                return None
            pieces[-1] += (grammar.separator if index else grammar.opening) + grammar.begin
            pieces += [arguments if grammar.parameters is None else _written_one_by_one(arguments, grammar.parameters)]
            pieces += [grammar.end + (grammar.closing if index == len(calls) - 1 else "")]
        return pieces

    def feed(self, text: str) -> list[ReplyEvent]:
        """The events that this text completes."""
        forgotten = self._source.feed(text, self._source.at if self._start is None else self._start)
        if self._start is not None:
            self._start, self._passed_on = 0, max(0, self._passed_on - forgotten)
        return self._advance()

    def finish(self, *, is_cut: bool = False) -> list[ReplyEvent]:
        """End the reply: the events of the text that was held back. `is_cut`: it ended at its length limit."""
        held = self._source.text[self._source.at :]
        if is_cut and held and self._start is None:
            self._warn(f"the reply was cut in {held!r}, which may begin a tool call: it is content")
        self._is_cut = is_cut
        self._source.has_ended = True
        events = self._advance()
        if self.num_calls == 0 and self._spaces:
            events.append(TextDelta(self._spaces))
        return events

    def read_reply(self) -> Step[None]:
        """Read the whole reply: content, and calls after each `call_mark`; with `is_leading`, at the beginning too."""
        if self.is_leading:
            yield from self._call(self._leading_calls(), self._source.at, is_marked=False)
        while (yield from self._source.until((self.call_mark,), self._content)):
            yield from self._call(self.read_calls(), self._source.at - len(self.call_mark))

    def read_calls(self) -> Step[None]:
        """Read the calls after a mark."""
        raise NotImplementedError

    def _advance(self) -> list[ReplyEvent]:
        next(self._parsing, None)
        events, self._events = self._events, []
        return events

    def _content(self, text: str) -> None:
        """Pass on a piece of the content. If the reply has calls, white space around its content is left out."""
        kept = text.rstrip()
        if kept:
            content = self._spaces + kept
            self._events.append(TextDelta(content.lstrip() if self.num_calls and not self._has_content else content))
            self._spaces, self._has_content = "", True
        self._spaces += text[len(kept) :]

    def _call(self, reading: Step[None], start: int, *, is_marked: bool = True) -> Step[bool]:
        """Read a call that begins at `start`. True if it is one, else its text is passed on as content, with a warning.

        Without `is_marked` there is no warning: text without a mark is usually plain text.
        """
        self._start = self._passed_on = start
        self._has_begun = False
        self._call_events = []
        try:
            yield from reading
        except BrokenCall as error:
            if is_marked or self._has_begun or self._is_cut:
                self._warn(f"text that looks like a tool call is passed on as content: {error}")
            if self._has_begun:
                self._events.append(ToolCallEnd(self.num_calls))
                self.num_calls += 1
                self.is_broken = True
            self._call_events = []
            self._content(self._source.text[self._passed_on : self._source.at])
            return False
        finally:
            self._start = None
        return True

    def _begin(self, name: str) -> None:
        """Begin a call by its name. Raises `BrokenCall` for a tool that may not be called."""
        if name not in self._tools:
            raise BrokenCall(f"there is no tool {excerpt(name)}")
        if self.num_calls == self._max_calls:
            raise BrokenCall(f"at most {self._max_calls} may be made")
        call_id = new_call_id(is_short=self.has_short_ids)
        self._text = []
        self._call_event(ToolCallDelta(self.num_calls, "", call_id, name))

    def _arguments(self, text: str) -> None:
        """Add a piece of the arguments' JSON text. Raises `BrokenCall` for half of a surrogate pair."""
        if not is_text(text):
            raise BrokenCall("its arguments have half of a surrogate pair, which is not a character")
        self._text.append(text)
        self._call_event(ToolCallDelta(self.num_calls, text))

    def _end(self) -> None:
        """End the call. Raises `BrokenCall` if its arguments are not a JSON object."""
        text = "".join(self._text)
        if not isinstance(parse_json(text), dict):
            raise BrokenCall("its arguments are not an object")
        self._call_event(ToolCallEnd(self.num_calls))
        self.num_calls += 1
        self._events += self._call_events
        self._call_events = []
        self._has_begun = False
        self._start = self._passed_on = self._source.at

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings and len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(warning)

    def _call_event(self, event: ReplyEvent) -> None:
        if self._streams_arguments:
            self._events.append(event)
            self._has_begun = True
            self._passed_on = self._source.at
        else:
            self._call_events.append(event)

    # Used by several formats.

    def _leading_calls(self) -> Step[None]:
        """Read calls without a mark. Raises `BrokenCall` unless the reply begins like one.

        With `streams_arguments` it must begin with the full text that the grammar of a call begins with.
        """
        source = self._source
        yield from source.spaces()
        words: tuple[str, ...] = (self.brackets[0] or "{",)
        if self._streams_arguments:
            grammars = filter(None, map(self.grammar, self._tools.values()))
            words = tuple(grammar.opening + grammar.begin for grammar in grammars)
        start, word = source.at, ""
        if words:
            word = yield from source.take(*words)
        if not word:
            raise BrokenCall("it is plain text")
        source.at = start
        yield from self.read_calls()

    def _json_arguments(self) -> Step[None]:
        """Read the arguments: a JSON object, or a string that holds one. Nothing and null are `{}`."""
        first = yield from self._source.peek()
        if first == "{":
            yield from self._source.json_value(self._arguments)
        elif first == '"':
            self._arguments((yield from self._source.json_string()) or "{}")
        else:
            pieces: list[str] = []
            yield from self._source.json_value(pieces.append)
            text = "".join(pieces)
            self._arguments("{}" if text in ("", "null") else text)


def _written_one_by_one(arguments: str, notation: Mapping[str, Any]) -> str:
    """The arguments in a `ParameterNotation`, given by its fields. Text that is not a JSON object stays as it is."""
    try:
        values = parse_json(arguments)
    except BrokenCall:
        return arguments
    if not isinstance(values, dict):
        return arguments
    written = []
    for name, value in values.items():
        text = json.dumps(value, ensure_ascii=False)
        if notation.get("has_plain_strings") and isinstance(value, str):
            text = value
        elif notation.get("has_python_constants"):
            text = repr(value)
        written.append(notation["begin"].replace("{}", name) + text + notation.get("end", ""))
    return str(notation.get("separator", "")).join(written)


def typed_value(text: str, schema: Any) -> str:
    """The JSON text of a value that a format writes without quotes.

    It is a string if the schema says so, if the text is not JSON, or if its JSON is of a type that the schema does not
    allow, while it allows strings: a postcode by `{"type": ["string", "null"]}`.
    """
    if not is_string(schema):
        try:
            kind, types = type(parse_json(text)), named_types(schema)
            if "string" not in types or kind is str or not types.isdisjoint(_TYPES[kind]):
                return text.strip()
        except BrokenCall:
            pass
    return json.dumps(text, ensure_ascii=False)


def named_types(schema: Any) -> set[str]:
    """The types that a schema or each of its alternatives names; none if one of these names none."""
    found = set[str]()
    alternatives = schema.get("anyOf", schema.get("oneOf", [schema])) if isinstance(schema, Mapping) else ()
    for part in alternatives if isinstance(alternatives, list) else ():
        types = part.get("type") if isinstance(part, Mapping) else None
        types = [types] if isinstance(types, str) else types if isinstance(types, list) else []
        if not types:
            return set()
        found.update(name for name in types if isinstance(name, str))
    return found


def is_string(schema: Any) -> bool:
    """Whether a value of this schema is a string. A grammar writes it without quotes, and all others as JSON."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def property_schemas(tool: Tool) -> Mapping[str, Any]:
    """The schemas of a tool's arguments by name."""
    properties = tool.schema().get("properties")
    return properties if isinstance(properties, Mapping) else {}

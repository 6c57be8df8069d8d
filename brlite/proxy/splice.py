"""Splices a stream of server-sent events: whole events go on at once as they came, byte for byte; half ones wait.

So what a client has seen is always whole, and after a failure an error event can follow. Chunks that hold whole events
keep their framing; only where an event is spread over chunks are new ones made. Knows no sockets, and of an event only
whether it is one: its data is JSON or `[DONE]`.
"""

from __future__ import annotations

import re
import sys

import msgspec

from brlite.proxy.framing import CHUNK_SIZE, Body, ChunkedBody, Misframed

LAST_CHUNK = b"0\r\n\r\n"
DONE = b"[DONE]"
EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
MAX_MARK_BYTES = 4
MAX_CHOICES = 1024  # of one stream: each is remembered until the end

_PLAIN_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})\r\ndata: (?=\{)")
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_FIELD = re.compile(rb"(?:event|id|retry)(?::|\Z)")
_LONG_EVENT = re.compile(rb"(?:data|event|id|retry)?:")
_JSON = msgspec.json.Decoder(msgspec.Raw)
_NULL = msgspec.Raw(b"null")


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    finish_reason: str | msgspec.UnsetType | None = msgspec.UNSET


class _Event(msgspec.Struct, gc=False):
    """What tells a stream that is at its end from one that was cut. Decoding it costs little more than checking it."""

    choices: list[_Choice] | None = None
    error: object = None
    usage: object = None
    message: msgspec.Raw = _NULL  # of `/v1/messages`; it and the next may hold a usage
    response: msgspec.Raw = _NULL


_EVENT = msgspec.json.Decoder(_Event)


class BrokenStream(Exception):
    """The stream is not, or no longer, one of whole events."""


class EventSplice:
    """Takes what an upstream sends, gives what the client gets: `feed` and `feed_eof`.

    `error` is set once the stream is broken; what `feed` gave until then is whole. `is_done` is its good end, with
    `needs_finish` only after a `finish_reason` of every choice that has that field, or after an error.

    Of an event longer than `max_event_bytes` the parts go on as they come, and are not looked at; while
    `is_within_event` nothing can follow but the rest of it.
    """

    __slots__ = (
        "_body",
        "_chunks",
        "_has_error",
        "_has_finished",
        "_has_unseen",
        "_held",
        "_is_chunked",
        "_max_event_bytes",
        "_needs_finish",
        "_saw_done",
        "_smallest_event",
        "error",
        "is_done",
        "is_within_event",
        "num_data_bytes",
        "num_events",
        "usage_events",
    )

    def __init__(self, body: Body, *, is_chunked: bool, max_event_bytes: int, needs_finish: bool) -> None:
        self._body = body
        self._chunks = body if is_chunked and isinstance(body, ChunkedBody) else None  # whose framing may be kept
        self._is_chunked = is_chunked  # how the client gets it; else as bare events
        self._max_event_bytes = max_event_bytes
        self._needs_finish = needs_finish
        self._has_finished: dict[int, bool] = {}  # the choices whose events have a finish_reason
        self._has_error = False
        self._has_unseen = False  # an event too long to be looked at
        self._saw_done = False
        self._held = bytearray()  # of an event that is not whole: what comes is added and looked at once
        self.num_events = 0
        self.num_data_bytes = 0
        self._smallest_event = sys.maxsize
        self.usage_events: tuple[bytes, ...] = ()  # the first and the last that tell it
        self.error: str | None = None
        self.is_done = False
        self.is_within_event = False

    @property
    def num_text_bytes(self) -> int:
        """About as many bytes as the events' texts have: events of a stream have the same fields around them."""
        return self.num_data_bytes - self._smallest_event * self.num_events if self.num_events else 0

    @property
    def has_excess(self) -> bool:
        """Whether more came than the stream."""
        return bool(self._body.excess)

    def feed(self, data: bytes) -> bytes:
        """What the client gets of the next bytes; b"" is nothing yet."""
        whole = 0
        try:
            chunks = self._chunks
            if chunks is not None and not self._held and not self.is_within_event and chunks.is_at_boundary:
                if text := _only_data(data):
                    self._check_data(text)
                    return data
                while end := self._whole_chunk(data, whole):
                    whole = end
                if whole == len(data):
                    return data
            return data[:whole] + self._feed_pieces(data[whole:])
        except (Misframed, BrokenStream) as error:
            self.error = str(error)
            return data[:whole]

    def feed_eof(self) -> bytes:
        """What the client gets when the upstream's connection has ended."""
        try:
            self._body.feed_eof()
            # Nothing but the stream itself can tell such an end from a cut.
            self._needs_finish = True
            return self._finish()
        except (Misframed, BrokenStream) as error:
            self.error = str(error)
            return b""

    def _whole_chunk(self, data: bytes, position: int) -> int:
        """Where the chunk at `position` ends, if it is all there and holds whole events, else 0."""
        size = CHUNK_SIZE.match(data, position)
        if size is None:
            return 0
        begin = size.end()
        end = begin + int(size[1], 16)
        line_end = data[end : end + 2]
        if end == begin or line_end != b"\r\n" or not data.endswith((b"\n\n", b"\r\n\r\n"), begin, end):
            return 0
        self._check(data[begin:end])
        return end + 2

    def _feed_pieces(self, data: bytes) -> bytes:
        held = self._held
        begin = max(0, len(held) - MAX_MARK_BYTES)  # an end may have begun there; nothing before was one
        held += self._body.feed(data)
        end = max(
            (held.rfind(mark, begin) + len(mark) for mark in EVENT_ENDS if held.find(mark, begin) >= 0), default=0
        )
        events = bytes(held[:end])
        del held[:end]
        if self.is_within_event and events:
            rest = _EVENT_END.split(events, 1)[1]  # what follows the end of the long event
            self._check(rest)
            self.is_within_event = False
            self.num_events += 1
            self._smallest_event = min(self._smallest_event, self._max_event_bytes)
        elif events:
            self._check(events)
        if len(held) > self._max_event_bytes or self.is_within_event:
            events += self._part_of_long_event()
        out = self._framed(events)
        return out + self._finish() if self._body.is_done else out

    def _part_of_long_event(self) -> bytes:
        """What may go on of an event that has not ended: all that cannot be a part of its end."""
        held = self._held
        if not self.is_within_event and not _LONG_EVENT.match(held):
            raise BrokenStream("it holds what is no event")
        self.is_within_event = self._has_unseen = True
        size = max(0, len(held) - MAX_MARK_BYTES)
        self.num_data_bytes += size
        part = bytes(held[:size])
        del held[:size]
        return part

    def _framed(self, events: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(events), events) if events and self._is_chunked else events

    def _finish(self) -> bytes:
        if self._held.strip() or self.is_within_event:
            raise BrokenStream("it ends in the middle of an event")
        if self._needs_finish and not self._saw_done:
            self._check_end(is_sure=bool(self._has_finished))
        self.is_done = True
        return LAST_CHUNK if self._is_chunked else b""

    def _check_end(self, *, is_sure: bool) -> None:
        """Raise `BrokenStream` if a choice has not come to its end, or nothing shows that any has."""
        if self._has_unseen:
            return  # it may have been in there
        if not self._has_error and not (is_sure and all(self._has_finished.values())):
            raise BrokenStream("it ends early")

    def _check(self, events: bytes) -> None:
        """Note what the events say. Raises `BrokenStream` if one of them is none."""
        if events.startswith(b"data: {") and events.find(b"\n") == len(events) - 2 and b"\r" not in events:
            self._check_data(events[6:-2])
            return
        for event in _EVENT_END.split(events):
            data = [line for line in _LINE_END.split(event) if line and not line.startswith(b":")]
            for line in data:
                if not line.startswith(b"data:") and not _FIELD.match(line):
                    raise BrokenStream("it holds what is no event")
            if text := b"\n".join(line[5:].lstrip(b" ") for line in data if line.startswith(b"data:")):
                self._check_data(text)

    def _check_data(self, text: bytes) -> None:
        if text[:1] != b"{" and text.strip() == DONE:
            if self._needs_finish:
                self._check_end(is_sure=self.num_events > 0)
            self._saw_done = True
            return
        try:
            text.isascii() or text.decode()
            self._note(_EVENT.decode(text), text)
        except msgspec.ValidationError:
            self._check_json(text)  # no completion's event, but one all the same
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise BrokenStream("an event of it is not JSON") from None
        self.num_events += 1
        size = len(text)
        self.num_data_bytes += size
        if size < self._smallest_event:
            self._smallest_event = size

    def _note(self, event: _Event, text: bytes) -> None:
        if event.error is not None:
            self._has_error = True
        if event.usage is not None or ((event.message != _NULL or event.response != _NULL) and b'"usage"' in text):
            self.usage_events = (*self.usage_events[:1], text)
        for choice in event.choices or ():
            reason = choice.finish_reason
            if reason is None:
                if choice.index not in self._has_finished:
                    self._has_finished[choice.index] = False
            elif reason is not msgspec.UNSET:
                self._has_finished[choice.index] = True
        if len(self._has_finished) > MAX_CHOICES:
            raise BrokenStream(f"it has more than {MAX_CHOICES} choices")

    def _check_json(self, text: bytes) -> None:
        try:
            _JSON.decode(text)
        except (msgspec.DecodeError, RecursionError):
            raise BrokenStream("an event of it is not JSON") from None


def _only_data(data: bytes) -> bytes | None:
    """The data of a chunk that holds one event with one line of it, as nearly all of them do; else None."""
    plain = _PLAIN_CHUNK.match(data)
    if plain is None:
        return None
    begin = plain.end()
    end = plain.end(1) + int(plain[1], 16)  # of the event, without the empty line behind it
    is_plain = data.find(b"\n", begin) == end and data.find(b"\r", begin) == end + 2 and data[end:] == b"\n\n\r\n"
    return data[begin:end] if is_plain else None

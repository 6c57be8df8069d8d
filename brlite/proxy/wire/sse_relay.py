"""Relays server-sent events. Complete events are forwarded unchanged, at once; an incomplete one is buffered.

A client therefore gets complete events only, and an error event can follow after a failure. A chunk that holds complete
events keeps its framing; an event that spans chunks gets a new chunk. The data of an event must be JSON or `[DONE]`.
Everything else follows the HTML Standard (§9.2.6, "Interpreting an event stream"): unknown fields, fields without a
colon, any line ends, a byte order mark. Contains no sockets.
"""

from __future__ import annotations

import re
import sys

import msgspec

from brlite.dialects.sse import DONE, DONE_EVENT
from brlite.errors import RequestError
from brlite.files.text_file import BYTE_ORDER_MARK
from brlite.proxy.stream_kinds import ERROR_TYPES, LAST_TYPES, OPENING_TYPES, StreamKind, error_event
from brlite.proxy.usage import Seen
from brlite.proxy.wire.framing import CHUNK_SIZE, LAST_CHUNK, Body, ChunkedBody, FramingError

EVENT_ENDS = (b"\n\n", b"\n\r", b"\r\r")  # two line ends; a second CR may be followed by its LF
MAX_MARK_BYTES = 4
COMMENT = b": keep-alive\n\n"
MAX_CHOICES = 1024  # of one stream; each takes memory until its end

_PLAIN_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})\r\ndata: (?=\{)")
_ROLE_ALONE = re.compile(rb'"delta": ?\{"role": ?"assistant"(?:, ?"\w+": ?(?:""|null))*\}')
_EVENT_END = re.compile(rb"(?:\n\n|[\r\n]\r\n?)[\r\n]*")  # with the empty lines after it
_LINE_END = re.compile(rb"\r\n|\n|\r")
_LONG_EVENT = re.compile(rb"(?:\xef\xbb\xbf)?(?:data|event|id|retry)?:")
_JSON = msgspec.json.Decoder(msgspec.Raw)
_NULL = msgspec.Raw(b"null")
_NOTHING = msgspec.Raw(b"")


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    finish_reason: str | msgspec.UnsetType | None = msgspec.UNSET
    logprobs: msgspec.Raw = _NOTHING


class _Event(msgspec.Struct, gc=False):
    """The fields that show whether a stream is complete. Decoding them costs little more than a check of the JSON."""

    choices: list[_Choice] | None = None
    error: object = None
    usage: object = None
    message: msgspec.Raw = _NULL  # of `/v1/messages`; `message` and `response` may contain a usage
    response: msgspec.Raw = _NULL
    logprobs: msgspec.Raw = _NOTHING
    type: object = None  # in the formats without choices
    sequence_number: object = None


_EVENT = msgspec.json.Decoder(_Event)


class BrokenStream(Exception):
    """The stream is malformed or cut. `good` are the complete events before the fault in the same bytes."""

    good = b""


class StreamContent:
    """Takes the data of each event by `read`.

    `has_end`: the last event has come: [DONE], or one of a last type. A stream that is resumed may be empty, or begin
    with [DONE]: the client may have the other events already.
    """

    __slots__ = (
        "_has_error",
        "_has_finished",
        "_has_text",
        "_has_unseen",
        "_kind",
        "_last_types",
        "_num_data_bytes",
        "_num_measured",
        "_sequence_number",
        "_smallest_event",
        "_usage_events",
        "has_end",
        "is_resumed",
        "num_events",
    )

    def __init__(self, kind: StreamKind, *, is_resumed: bool) -> None:
        self._kind = kind
        self._last_types = LAST_TYPES[kind]
        self._has_finished: dict[int, bool] = {}  # by choice: whether it has a finish_reason
        self._has_error = False
        self._has_text = False  # an event came that is neither an error nor an opening
        self._has_unseen = False  # an event was too long to be decoded
        self._sequence_number = 0  # of the next event, in formats that number events
        self._num_data_bytes = 0
        self._num_measured = 0  # events of which `_num_data_bytes` are
        self._smallest_event = sys.maxsize
        self._usage_events: tuple[bytes, ...] = ()  # the first and the last event with a usage
        self.has_end = False
        self.is_resumed = is_resumed
        self.num_events = 0

    @property
    def seen(self) -> Seen:
        """What the stream shows about the number of tokens used.

        The bytes of the texts are estimated: all events of a stream have the same fields around their texts.
        """
        num_measured = self._num_measured
        num_text_bytes = self._num_data_bytes - self._smallest_event * num_measured if num_measured else 0
        is_refusal = self._has_error and not self._has_text
        return Seen(self._usage_events, self.num_events, num_text_bytes, is_refusal=is_refusal)

    def error_event(self, error: RequestError) -> bytes:
        """The event that ends the stream with this error. b"" if it is complete."""
        return b"" if self.has_end else error_event(self._kind, error, self._sequence_number)

    def read(self, text: bytes) -> None:
        """Check an event's data, and note its fields and size. Raises `BrokenStream`."""
        if text[:1] != b"{" and text.strip() == DONE:
            if self._kind is StreamKind.COMPLETIONS:
                self._check_finished(is_sure=self.num_events > 0)
            self.has_end = self.has_end or not self._last_types
            return
        size = len(text)
        try:
            text.isascii() or text.decode()
            size = self._note(_EVENT.decode(text), text)
        except msgspec.ValidationError:  # not an event of a completion; it may be one of another API
            self._has_text = True
            try:
                _JSON.decode(text)
            except (msgspec.DecodeError, RecursionError):
                raise BrokenStream("an event of it is not JSON") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise BrokenStream("an event of it is not JSON") from None
        self.num_events += 1
        if size <= 0:
            return
        self._num_measured += 1
        self._num_data_bytes += size
        if size < self._smallest_event:
            self._smallest_event = size

    def skip(self, num_bytes: int) -> None:
        """Count bytes of an event that is too long to be decoded."""
        self._has_unseen = self._has_text = True
        self._num_data_bytes += num_bytes

    def end_skipped(self, max_event_bytes: int) -> None:
        """Count the event whose bytes `skip` got."""
        self.num_events += 1
        self._num_measured += 1
        self._smallest_event = min(self._smallest_event, max_event_bytes)

    def check_end(self) -> bool:
        """At the end of the framing: whether a [DONE] is missing. Raises `BrokenStream` if the stream is cut."""
        if self.has_end or (self.is_resumed and not self.num_events):
            return False
        self._check_finished(is_sure=bool(self._has_finished))
        return self._kind is StreamKind.COMPLETIONS

    def _check_finished(self, *, is_sure: bool) -> None:
        """Raise `BrokenStream` if a choice has not finished, or if no choice is known to have finished."""
        if self._has_unseen:
            return  # the long event may have contained the finish_reason
        if self.is_resumed and not self.num_events:
            return  # the client may have seen all events before
        if not self._has_error and not (is_sure and all(self._has_finished.values())):
            raise BrokenStream("it ends early")

    def _note(self, event: _Event, text: bytes) -> int:
        """Note an event's fields. Returns its bytes without logprobs; 0 for an error, and for what was sent before."""
        size = len(text) - len(event.logprobs)
        has_response = event.response is not _NULL and event.response != _NULL  # the default is that object
        is_error, is_repeat, is_opening = event.error is not None, has_response, has_response
        if event.usage is not None or ((has_response or event.message != _NULL) and b'"usage"' in text):
            self._usage_events = (*self._usage_events[:1], text)
        if event.type is not None and self._last_types:
            if isinstance(event.type, str):
                self.has_end |= event.type in self._last_types
                is_repeat |= event.type.endswith(".done")  # of Responses, after the deltas
                is_error |= event.type in ERROR_TYPES
                is_opening |= event.type in OPENING_TYPES
            if isinstance(event.sequence_number, int):
                self._sequence_number = event.sequence_number + 1
        for choice in event.choices or ():
            size -= len(choice.logprobs)
            reason = choice.finish_reason
            if reason is None:
                if choice.index not in self._has_finished:
                    self._has_finished[choice.index] = False
            elif reason is not msgspec.UNSET:
                self._has_finished[choice.index] = True
        if len(self._has_finished) > MAX_CHOICES:
            raise BrokenStream(f"it has more than {MAX_CHOICES} choices")
        self._has_error |= is_error
        if not self._has_text:
            self._has_text = not (is_error or is_opening or _ROLE_ALONE.search(text))
        return 0 if is_repeat or is_error else size


class SseRelay:
    """Turns the bytes from an upstream into the bytes for a client, by `feed` and `feed_eof`.

    `error` is set when the stream is broken; all events before that were complete. `is_done` is set when the stream is
    complete. Its last event decides: a connection that ends before that event has cut the stream, a later end has not.
    A stream of completions whose choices have all finished without `[DONE]` gets one.

    An event longer than `max_event_bytes` is relayed in parts without a check. While `is_within_event`, only the rest
    of that event may be sent to the client.
    """

    __slots__ = (
        "_body",
        "_chunks",
        "_content",
        "_has_comment",
        "_held",
        "_is_at_start",
        "_is_chunked",
        "_is_spoilt",
        "_max_event_bytes",
        "_needs_end",
        "error",
        "is_done",
        "is_within_event",
    )

    def __init__(
        self, body: Body, *, is_chunked: bool, max_event_bytes: int, kind: StreamKind, is_resumed: bool = False
    ) -> None:
        self._body = body
        # Set if chunks can keep their framing.
        self._chunks = body if is_chunked and isinstance(body, ChunkedBody) else None
        self._is_chunked = is_chunked  # whether the client gets chunks
        self._max_event_bytes = max_event_bytes
        self._content = StreamContent(kind, is_resumed=is_resumed)
        self._needs_end = kind is not StreamKind.OTHER
        self._has_comment = False  # `comment` was called before the first bytes of the stream
        self._is_spoilt = False  # the connection cannot be used again
        self._is_at_start = True
        self._held = bytearray()  # the bytes of an incomplete event
        self.error: str | None = None
        self.is_done = False
        self.is_within_event = False

    @property
    def can_take_event(self) -> bool:
        """Whether an error event can follow: false within an event that is relayed in parts."""
        return not self.is_within_event

    @property
    def seen(self) -> Seen:
        """What the stream shows about the number of tokens used."""
        return self._content.seen

    @property
    def has_excess(self) -> bool:
        """Whether bytes have arrived after the end of the stream, or may arrive."""
        return self._is_spoilt or bool(self._body.excess)

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the upstream. Returns the bytes for the client, which may be none."""
        whole = 0
        try:
            chunks = self._chunks
            if chunks is not None and not self._held and not self.is_within_event and chunks.is_at_boundary:
                if plain := _PLAIN_CHUNK.match(data):  # as nearly all chunks: one event of one data line
                    begin, end = plain.end(), plain.end(1) + int(plain[1], 16)  # of the data
                    is_one_line = begin < end and data.find(b"\n", begin) == end and data.find(b"\r", begin) == end + 2
                    if is_one_line and data[end:] == b"\n\n\r\n":
                        self._content.read(data[begin:end])
                        return data
                while end := self._whole_chunk(data, whole):
                    whole = end
                if whole == len(data):
                    return data
            return data[:whole] + self._feed_pieces(data[whole:])
        except BrokenStream as error:
            return data[:whole] + self._framed(error.good) + self._break(error)

    def feed_eof(self) -> bytes:
        """Handle the end of the upstream's connection. Returns the last bytes for the client."""
        try:
            self._body.feed_eof()
        except FramingError as error:
            return self._break(error)
        self._needs_end, self._content.is_resumed = True, False  # the end of a connection may be a cut
        return self._finish()

    def end_if_whole(self) -> bytes | None:
        """The bytes that end a stream whose connection stays open. None if the stream is not complete."""
        if not self._content.has_end or self.is_within_event:
            return None
        self._is_spoilt = self.is_done = True
        return LAST_CHUNK if self._is_chunked else b""

    def comment(self) -> bytes:
        """The bytes of a comment, which keeps the client's connection open. b"" after the last event or within one."""
        if self._content.has_end or self.is_within_event:
            return b""
        self._has_comment |= self._is_at_start and not self._content.num_events
        return self._framed(COMMENT)

    def error_event(self, error: RequestError) -> bytes:
        """The bytes that end the stream for the client: an error event, unless the stream is complete."""
        event = self._framed(self._content.error_event(error))
        return event + LAST_CHUNK if self._is_chunked else event

    def _break(self, error: Exception) -> bytes:
        """End the stream: complete if its last event has arrived, else broken. Returns the bytes for the client."""
        end = self.end_if_whole()
        if end is None:
            self.error = str(error)
        return end or b""

    def _whole_chunk(self, data: bytes, position: int) -> int:
        """The end index of the chunk at `position` if it is complete and holds complete events, else 0."""
        size = CHUNK_SIZE.match(data, position)
        if size is None:
            return 0
        begin = size.end()
        end = begin + int(size[1], 16)
        line_end = data[end : end + 2]
        if end == begin or line_end != b"\r\n" or not data.endswith((b"\n\n", b"\r\n\r\n"), begin, end):
            return 0
        if self._has_comment and data.startswith(BYTE_ORDER_MARK, begin):
            return 0
        self._read_events(data[begin:end])
        return end + 2

    def _feed_pieces(self, data: bytes) -> bytes:
        held = self._held
        begin = max(0, len(held) - MAX_MARK_BYTES)  # no event's end begins before this index
        misframed: FramingError | None = None
        try:
            held += self._body.feed(data)
        except FramingError as error:
            held += error.payload
            misframed = error
        if self._has_comment and len(held) >= len(BYTE_ORDER_MARK):
            # A byte order mark after a comment is no longer the first character: it would be a part of a field's name.
            self._has_comment = False
            if not self._content.num_events and held.startswith(BYTE_ORDER_MARK):
                del held[: len(BYTE_ORDER_MARK)]
        events = self._take_events(begin)
        if self.is_within_event and events:
            rest = _EVENT_END.split(events, 1)[1]  # what follows the end of the long event
            self.is_within_event = False
            self._content.end_skipped(self._max_event_bytes)
            self._read_events(events, len(events) - len(rest))
        elif events:
            self._read_events(events)
        if len(held) > self._max_event_bytes or self.is_within_event:
            if not self.is_within_event and not _LONG_EVENT.match(held):
                return self._framed(events) + self._break(BrokenStream("it contains bytes that are no event"))
            # Relay what cannot be a part of its end.
            self.is_within_event = True
            size = max(0, len(held) - MAX_MARK_BYTES)
            self._content.skip(size)
            events += bytes(held[:size])
            del held[:size]
        out = self._framed(events)
        if misframed is not None:
            return out + self._break(misframed)
        return out + self._finish() if self._body.is_done else out

    def _take_events(self, begin: int) -> bytes:
        """Remove all complete events from the buffer; none ends before the index `begin`."""
        held = self._held
        end = max(held.rfind(mark, begin) + 2 for mark in EVENT_ENDS)
        if end < 2:
            return b""
        if held[end - 1 : end + 1] == b"\r\n":
            end += 1
        events = bytes(held[:end])
        del held[:end]
        return events

    def _framed(self, events: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(events), events) if events and self._is_chunked else events

    def _finish(self) -> bytes:
        """Handle the end of the body's framing; the stream may still be cut. Returns the last bytes for the client."""
        if self._held.strip() or self.is_within_event:
            return self._break(BrokenStream("it ends in the middle of an event"))
        end = self._framed(bytes(self._held))  # line ends after the last event, such as the LF of its CR LF
        if self._needs_end:
            try:
                if self._content.check_end():
                    end += self._framed(DONE_EVENT)
            except BrokenStream as error:
                return self._break(error)
        self.is_done = True
        return end + LAST_CHUNK if self._is_chunked else end

    def _read_events(self, events: bytes, begin: int = 0) -> None:
        """Check the events from `begin` on, and note their fields. Raises `BrokenStream` for malformed ones."""
        is_plain = not begin and events.startswith(b"data: {")
        if is_plain and events.find(b"\n") == len(events) - 2 and b"\r" not in events:
            self._content.read(events[6:-2])
            return
        is_at_start, self._is_at_start = self._is_at_start and not self._content.num_events, False
        if is_at_start and events.startswith(BYTE_ORDER_MARK):
            begin = len(BYTE_ORDER_MARK)
        good = 0 if is_at_start else begin
        for event_end in _EVENT_END.finditer(events, begin):
            lines = _LINE_END.split(events[begin : event_end.start()])
            fields = (line.partition(b":") for line in lines)
            text = b"\n".join(value for name, _, value in fields if name == b"data")
            try:
                if text.strip():
                    self._content.read(text)
            except BrokenStream as error:
                error.good = events[:good]
                raise
            begin = good = event_end.end()

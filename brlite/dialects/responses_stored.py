"""Responses as they are stored, and the events of a response, which can be read while more come."""

from __future__ import annotations

import zlib

from msgspec import Raw, Struct

from brlite.dialects.sse import EVENT_END
from brlite.errors import InvalidRequest

STATE_BYTES = 16 * 1024  # of one `KeptEvents` without events
READ_BYTES = 4096  # of compressed events at once: some 40 KB of events, 0.1 ms
NOT_KEPT = "the events of this response were not kept: the store was full (limits.max_stored_bytes)"


class FinishedResponse(Struct, frozen=True):
    """A response: the `body` as sent, the items before it, and its own items by id.

    `stream` has its events, compressed, also if the response was not streamed; it is empty if they were not kept. While
    a background response `is_running`, it has neither output nor events here.
    """

    id: str
    body: bytes
    input: tuple[Raw, ...]
    output: dict[str, Raw]
    stream: bytes = b""
    is_background: bool = False
    is_running: bool = False

    def events(self, starting_after: int | None) -> bytes:
        """The stream's events after the one with this number; None: all. It takes 1 ms for 250 KB.

        Raises `InvalidRequest` if the stream has no event with this number, or was not kept.
        """
        if not self.stream:
            raise not_kept()
        events = zlib.decompress(self.stream).split(EVENT_END)[:-1]
        check_starting_after(starting_after, len(events))
        behind = events if starting_after is None else events[starting_after + 1 :]  # numbers begin at 0
        return b"".join([event + EVENT_END for event in behind])


class KeptEvents:
    """The events of one response, compressed as they come. They can be read (`EventReader`) while more come.

    It takes `STATE_BYTES` and `num_bytes` of memory.
    """

    def __init__(self) -> None:
        # Events repeat the same fields, so a short window is enough. None: nothing is added any more.
        self._compressor: zlib._Compress | None = zlib.compressobj(1, zlib.DEFLATED, 11, 4)
        self._data = bytearray()
        self._is_flushed = True
        self.num_events = 0
        self.is_dropped = False

    @property
    def num_bytes(self) -> int:
        return len(self._data)

    def add(self, event: bytes) -> None:
        self.num_events += 1
        if self._compressor is not None:
            self._data += self._compressor.compress(event)
            self._is_flushed = False

    def read(self, begin: int, end: int) -> bytes:
        """A slice of the compressed events. It has whole events if it ends with the last one."""
        if self._compressor is not None and not self._is_flushed:
            self._data += self._compressor.flush(zlib.Z_SYNC_FLUSH)
            self._is_flushed = True
        return bytes(self._data[begin:end])

    def finish(self) -> bytes:
        """All events, compressed. None can be added later. Empty if they were dropped."""
        if self._compressor is not None:
            self._data += self._compressor.flush()
            self._compressor = None
        return bytes(self._data)

    def drop(self) -> None:
        """Free all events; later ones are not kept either."""
        self._compressor, self.is_dropped = None, True
        self._data = bytearray()


class EventReader:
    """Reads kept events, those after number `starting_after`; None: all."""

    def __init__(self, kept: KeptEvents, starting_after: int | None) -> None:
        self._kept = kept
        self._decompressor = zlib.decompressobj()
        self._position = 0
        self._rest = b""  # the beginning of an event
        self._num_left_out = 0 if starting_after is None else starting_after + 1

    def read(self) -> bytes | None:
        """The next events. May be empty if there are more to read. None: there are none yet."""
        piece = self._kept.read(self._position, self._position + READ_BYTES)
        if not piece:
            return None
        self._position += len(piece)
        whole, end, self._rest = (self._rest + self._decompressor.decompress(piece)).rpartition(EVENT_END)
        if not self._num_left_out:
            return whole + end
        events = (whole + end).split(EVENT_END)[:-1]
        behind = events[self._num_left_out :]
        self._num_left_out = max(0, self._num_left_out - len(events))
        return b"".join([event + EVENT_END for event in behind])


def check_starting_after(number: int | None, num_events: int) -> None:
    """Raise `InvalidRequest` unless there is an event with this number."""
    if number is not None and number >= num_events:
        text = f"starting_after is {number}; this response's events are numbered 0 to {num_events - 1}"
        raise InvalidRequest(text, param="starting_after")


def not_kept() -> InvalidRequest:
    return InvalidRequest(NOT_KEPT, param="stream", code="stream_not_resumable")

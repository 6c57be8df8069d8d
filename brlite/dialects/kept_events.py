"""The events of one stream, kept compressed in memory. They can be read from the beginning while more come."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from brlite.dialects.sse import EVENT_END

STATE_BYTES = 16 * 1024  # of one `KeptEvents` without events
LAST_BYTES = 16 * 1024  # compressed; some 160 KB of events
READ_BYTES = 4096  # compressed, at once
MAX_READ_BYTES = 64 * 1024  # of events at once; decompressing them takes some 0.2 ms


class KeptEvents:
    """The events of one stream, compressed as they come. `EventReader` reads them.

    It takes `STATE_BYTES` of memory and the compressed events. `grow` counts the latter. It returns False if there is
    no room for them: from then on only the last `LAST_BYTES` are kept, for readers that have the events before these.
    """

    def __init__(self) -> None:
        # Events repeat the same fields, so a short window is enough. None: nothing is added any more.
        self._compressor: zlib._Compress | None = zlib.compressobj(1, zlib.DEFLATED, 11, 4)
        self._data = bytearray()
        self._is_flushed = True
        self._grow: Callable[[int], bool] = lambda num_bytes: True
        self._num_counted = 0
        self.num_forgotten_bytes = 0  # before `_data`
        self.num_events = 0
        self.is_dropped = False

    @property
    def num_bytes(self) -> int:
        """The bytes of the compressed events."""
        return len(self._data)

    def count_with(self, grow: Callable[[int], bool]) -> None:
        """Set `grow`, which takes a number of new bytes. Call it before the first event."""
        self._grow = grow

    def add(self, events: bytes) -> None:
        """Keep whole events. Does nothing after `finish`."""
        if self._compressor is None:
            return
        self.num_events += events.count(EVENT_END)
        self._data += self._compressor.compress(events)
        self._is_flushed = False
        num_grown, self._num_counted = len(self._data) - self._num_counted, len(self._data)
        if num_grown > 0 and not self.is_dropped:
            self.is_dropped = not self._grow(num_grown)
        if self.is_dropped and len(self._data) > LAST_BYTES:
            self.num_forgotten_bytes += len(self._data) - LAST_BYTES
            del self._data[:-LAST_BYTES]

    def read(self, position: int) -> bytes:
        """The next compressed bytes. Empty if there are none yet. They have whole events if they are the last ones."""
        if self._compressor is not None and not self._is_flushed:
            self._data += self._compressor.flush(zlib.Z_SYNC_FLUSH)
            self._is_flushed = True
        begin = position - self.num_forgotten_bytes
        return bytes(self._data[begin : begin + READ_BYTES])

    def finish(self) -> bool:
        """Let no event be added later. Returns whether all events are kept."""
        if self._compressor is not None:
            self._data += self._compressor.flush()
            self._compressor = None
            del self._grow  # it may refer to what keeps these events: a cycle, which only a full collection would free
        return not self.is_dropped


class EventReader:
    """Reads kept events, without the first `num_seen`."""

    def __init__(self, kept: KeptEvents, num_seen: int) -> None:
        self._kept = kept
        self._num_left_out = num_seen
        self._decompressor = zlib.decompressobj()
        self._position = 0
        self._rest = b""  # the beginning of an event

    @property
    def is_late(self) -> bool:
        """Whether the next event is forgotten. Then `read` must not be called."""
        return self._position < self._kept.num_forgotten_bytes

    def read(self) -> list[bytes] | None:
        """The next events. May be empty if there are more to read. None: there are none yet."""
        piece = self._decompressor.unconsumed_tail
        if not piece:
            piece = self._kept.read(self._position)
            self._position += len(piece)
        data = self._decompressor.decompress(piece, MAX_READ_BYTES)
        if not (piece or data):
            return None
        *events, self._rest = (self._rest + data).split(EVENT_END)
        num_left_out = min(self._num_left_out, len(events))
        self._num_left_out -= num_left_out
        return [event + EVENT_END for event in events[num_left_out:]]

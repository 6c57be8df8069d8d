"""A stream that continues when its client disconnects. Its events are recorded; a client gets those not yet received.

The first request enables this with `Last-Event-ID: 0` and an `Idempotency-Key`. A later request sends the number of the
last event that it received. Events count from 1. A stream without the header is not recorded and ends with its client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.dialects.sse import EVENT_END
from brlite.errors import InvalidRequest
from brlite.http.events import BACKLOG_BYTES, EventStream

HEADER = "Last-Event-ID"
MAX_DIGITS = 9  # of an event's number


class DetachedStream:
    """A stream that is not a client's. It has the methods of `EventStream`, for the delivery that writes it.

    Clients follow it. It neither waits for them nor ends with them.
    """

    is_backlogged = False

    def __init__(self) -> None:
        self._has_begun = self._is_over = False
        self._changed = asyncio.get_running_loop().create_future()

    async def prepare(self) -> None:
        self._has_begun = True
        self._notify()

    def write(self, events: bytes) -> bool:
        raise NotImplementedError

    @contextmanager
    def telling(self, what: Callable[[], str], seconds: float) -> Iterator[None]:
        """Does nothing: comments are not recorded. `follow` sends its own."""
        yield

    async def drained(self, seconds: float) -> bool:
        return True

    async def finish(self, last_events: bytes = b"") -> web.StreamResponse:
        self.write(last_events)
        self.close()
        return web.StreamResponse()

    def close(self) -> None:
        """Mark the stream as complete. May be called twice, and before `prepare`."""
        self._is_over = True
        self._notify()

    async def begun(self) -> bool:
        """Wait until the stream has begun: True. False if its request was refused before the first event."""
        while not self._has_begun and not self._is_over:
            await asyncio.shield(self._changed)
        return self._has_begun

    def _notify(self) -> None:
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()


class RecordedStream(DetachedStream):
    """The events of one stream, kept in memory.

    `follow` sends the events to a client, also those that are written later. Beyond `max_bytes` the oldest events are
    dropped until half of that is left.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._events: list[bytes] = []
        self._num_forgotten = 0  # dropped events before `_events`
        self._num_bytes, self._max_bytes = 0, max_bytes

    def write(self, events: bytes) -> bool:
        new = split_events(events)
        self._events += new
        self._num_bytes += sum(map(len, new))
        if self._num_bytes > self._max_bytes:
            num_events = 0
            while self._num_bytes > self._max_bytes // 2:
                self._num_bytes -= len(self._events[num_events])
                num_events += 1
            del self._events[:num_events]
            self._num_forgotten += num_events
        self._notify()
        return True

    async def follow(self, request: web.Request, num_seen: int, limits: LimitsConfig) -> web.StreamResponse:
        """Send the numbered events after the first `num_seen`, until the stream ends or the client leaves.

        Raises `InvalidRequest` if there are fewer events, or if the next one was dropped. If a client reads so slowly
        that its next event is dropped meanwhile, its connection is cut.
        """
        check_num_seen(num_seen, self._num_forgotten + len(self._events))
        if num_seen < self._num_forgotten:
            raise not_resumable()
        async with EventStream(request, limits.sse_comment_seconds) as stream:
            while num_seen >= self._num_forgotten:
                begin = end = num_seen - self._num_forgotten
                num_bytes = 0
                while end < len(self._events) and num_bytes < BACKLOG_BYTES:  # at most about BACKLOG_BYTES a write
                    num_bytes += len(self._events[end])
                    end += 1
                events = self._events[begin:end]
                if events:
                    if not stream.write(numbered(events, num_seen)):
                        break
                    num_seen += len(events)
                    if not await stream.drained(limits.slow_client_seconds):
                        break
                elif self._is_over:
                    break
                else:
                    await asyncio.shield(self._changed)
            else:
                stream.abort()
            return await stream.finish()


RECORDED = web.RequestKey("recorded", DetachedStream)  # where the events of a request are recorded


def last_event_id(request: web.Request) -> int | None:
    """The number in the `Last-Event-ID` header: how many events the client has. Raises `InvalidRequest`."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise InvalidRequest(
            f"{HEADER} must be the id of the last event that came, or 0, got {text[:64]!r}", param=HEADER
        )
    return int(text)


def split_events(stream: bytes) -> list[bytes]:
    """The complete events of a stream's bytes, each with its end mark."""
    return [event + EVENT_END for event in stream.split(EVENT_END)[:-1]]


def numbered(events: Sequence[bytes], num_before: int) -> bytes:
    """The events with their numbers as ids; the first number is `num_before` + 1."""
    return b"".join(b"id: %d\n%b" % (number, event) for number, event in enumerate(events, num_before + 1))


def check_num_seen(num_seen: int, num_events: int) -> None:
    if num_seen > num_events:
        raise InvalidRequest(f"{HEADER} is {num_seen}; the stream has {num_events} events so far", param=HEADER)


def not_resumable() -> InvalidRequest:
    return InvalidRequest(
        f"This stream cannot be resumed: it failed, was aborted or is forgotten. Begin anew with {HEADER}: 0.",
        param=HEADER,
        code="stream_not_resumable",
    )

"""Server-sent events on an aiohttp response: framed events go straight to the transport, no task is woken.

The handler never waits for a write; it reads `is_backlogged` and merges or waits. Comments keep silent streams alive.
`dialects/` frames the events.

A transport gets its events in the next turn of the event loop, by one call for the streams of a server. So the writes
of all streams of an engine step follow each other, and the next step begins before them (`bench/serving.md`).

It relies on public behaviour of aiohttp. After `StreamResponse.prepare()` the transport has the headers, so later
writes follow them. `write_eof()` ends the chunked encoding, and the connection then takes its next request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from aiohttp import HttpVersion11, web

from brlite.http.stall import StallTimer

logger = logging.getLogger(__name__)

BACKLOG_BYTES = 64 * 1024

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",  # else a compressing middleware would buffer the events
    "X-Accel-Buffering": "no",  # else nginx would buffer them
}


class WriteTurn:
    """Writes the unsent events of an application's streams in the next turn of the event loop."""

    def __init__(self) -> None:
        self.streams: list[EventStream] = []  # if there are any, `flush` is scheduled

    def flush(self) -> None:
        streams, self.streams = self.streams, []
        now = time.monotonic()
        for stream in streams:
            stream.last_write = now
            try:
                stream.flush()
            except Exception:  # a failing transport must not hold up the other streams
                logger.exception("events could not be written")
                stream.abort()


WRITE_TURN = web.AppKey("write_turn", WriteTurn)


class EventStream:
    """A stream of events that answers `request`.

    `prepare` sends the headers, and `finish` ends the stream normally. `close` must always follow: it stops the
    comments. `async with` calls `prepare` and `close`.
    """

    def __init__(self, request: web.Request, comment_seconds: float, headers: Mapping[str, str] | None = None) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={**_HEADERS, **(headers or {})})
        self._is_chunked = request.version >= HttpVersion11
        self._comment_seconds = comment_seconds
        self._comment_text: Callable[[], str] = lambda: "keep-alive"
        self._loop = asyncio.get_running_loop()
        self._turn = request.app.get(WRITE_TURN) or WriteTurn()  # without the middlewares: a turn of its own
        self._unsent = b""  # if not empty, the stream is in `_turn`, which flushes it
        self.last_write = 0.0  # by the monotonic clock
        self.is_clear = False  # whether the last write went out whole, to a client that is there
        self._comment_timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> EventStream:
        await self.prepare()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    async def prepare(self) -> None:
        """Send the headers. Raises `ConnectionResetError` if the client has left."""
        if not self._is_chunked:
            self._response.force_close()  # in HTTP/1.0 a stream ends with its connection
        await self._response.prepare(self._request)
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client left before the first event")
        self._transport = transport
        self.last_write = time.monotonic()
        self._start_comments()

    def write(self, events: bytes) -> bool:
        """Write framed events in the next turn of the loop. Returns False and writes nothing if the client has left."""
        if self._transport.is_closing():
            return False
        if events:  # a chunk without bytes would end the response
            self.append(events)
        return True

    def append(self, events: bytes) -> None:
        """Write at least one event in the next turn. It does not look at the transport: only while `is_clear`."""
        if self._is_chunked:
            events = b"%x\r\n%b\r\n" % (len(events), events)
        if self._unsent:
            self._unsent += events
            return
        self._unsent, streams = events, self._turn.streams
        if not streams:
            self._loop.call_soon(self._turn.flush)
        streams.append(self)

    def flush(self) -> None:
        """Write now what `write` has taken."""
        unsent, self._unsent, transport = self._unsent, b"", self._transport
        # uvloop raises, and asyncio warns, on a write after close.
        if transport.is_closing():
            self.is_clear = False
        elif unsent:
            transport.write(unsent)
            self.is_clear = not transport.get_write_buffer_size()

    def comment(self) -> bool:
        """Write a comment line, which clients ignore."""
        return self.write(b": %b\n\n" % self._comment_text().encode())

    @contextmanager
    def commenting(self, what: Callable[[], str], seconds: float) -> Iterator[None]:
        """Inside the block, comments contain `what()`, one line.

        One is written now. The interval becomes `seconds`, unless the usual one is shorter.
        """
        usual = self._comment_text, self._comment_seconds
        self._comment_text, self._comment_seconds = what, min(seconds, self._comment_seconds)
        self.comment()
        self._start_comments()
        try:
            yield
        finally:
            self._comment_text, self._comment_seconds = usual
            self._start_comments()

    @property
    def is_backlogged(self) -> bool:
        """Whether the client is so far behind that further events should wait."""
        return len(self._unsent) + self._transport.get_write_buffer_size() > BACKLOG_BYTES

    async def drained(self, seconds: float) -> bool:
        """Wait until the client has caught up. If it reads nothing for `seconds`, cut the connection: False."""
        self.flush()
        stall = StallTimer(self._transport, seconds)
        stall.start()
        try:
            await self._request.writer.drain()
        except ConnectionError:
            return False
        finally:
            stall.stop()
        return not self._transport.is_closing()

    def abort(self) -> None:
        """Cut the connection, so that the client sees an incomplete response."""
        self._transport.abort()

    async def finish(self, last_events: bytes = b"") -> web.StreamResponse:
        """Write the last events and end the response. Returns the response that the handler must return."""
        self.close()
        self.flush()
        with suppress(ConnectionError):  # the client left before the end; aiohttp handles that
            await self._response.write_eof(last_events)
        return self._response

    def close(self) -> None:
        """Stop the comments. May be called twice, and before `prepare`."""
        if self._comment_timer is not None:
            self._comment_timer.cancel()
            self._comment_timer = None

    def _comment_if_silent(self) -> None:
        silence = time.monotonic() - self.last_write
        if silence >= self._comment_seconds and not self.is_backlogged:
            self.comment()
            silence = 0.0
        if not self._transport.is_closing():
            wait = max(self._comment_seconds - silence, 0.01)
            self._comment_timer = self._loop.call_later(wait, self._comment_if_silent)

    def _start_comments(self) -> None:
        self.close()
        self._comment_timer = self._loop.call_later(self._comment_seconds, self._comment_if_silent)

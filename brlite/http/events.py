"""Server-sent events on an aiohttp response: framed bytes go straight to the transport, one write for each send.

The handler never waits for a write; it asks `is_backlogged` and merges or waits. Comments keep silent streams alive.
It knows no JSON and no tokens: an event is bytes without line breaks.

Relied on, all public: after `StreamResponse.prepare()` the headers are with the transport, so what is written there
follows them; `write_eof()` ends the chunked encoding, after which the connection takes its next request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from aiohttp import HttpVersion11, web

from brlite.http.stall import StallTimer

BACKLOG_BYTES = 64 * 1024

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",  # a compressing middleware would collect the events,
    "X-Accel-Buffering": "no",  # and nginx would
}
_DONE = b"data: [DONE]\n\n"
# Characters that Python's `str.splitlines` takes for line ends, as clients that are built on it do, and JSON does not.
_LINE_ENDS = (("\u2028", b"\\u2028"), ("\u2029", b"\\u2029"), ("\x85", b"\\u0085"))


def on_one_line(event: bytes) -> bytes:
    """JSON whose line separators are escaped, so that it is one line in every reader's eyes."""
    if not event.isascii():
        for character, escape in _LINE_ENDS:
            event = event.replace(character.encode(), escape)
    return event


class EventStream:
    """A stream of events that answers `request`.

    `async with EventStream(request, comment_seconds) as stream:` sends the headers, and stops the comments at the end,
    however that comes; `return await stream.finish()` inside it is the good end.
    """

    def __init__(self, request: web.Request, comment_seconds: float) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=_HEADERS)
        self._is_chunked = request.version >= HttpVersion11
        self._comment_seconds = comment_seconds
        self._comment_text: Callable[[], str] = _keep_alive
        self._loop = asyncio.get_running_loop()
        self._last_write = 0.0
        self._comment_timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> EventStream:
        await self.prepare()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_comments()

    async def prepare(self) -> None:
        """Send the headers. From here on errors travel in the stream."""
        if not self._is_chunked:
            self._response.force_close()  # HTTP/1.0 knows the end of a stream by the end of its connection
        await self._response.prepare(self._request)
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client left before the first event")
        self._transport = transport
        self._last_write = self._loop.time()
        self._start_comments()

    def send(self, *events: bytes) -> bool:
        """Write the events, JSON each, in one go. False, and nothing written, if the client has left."""
        return self._write(b"data: %b\n\n" % on_one_line(b"\n\ndata: ".join(events)))

    def comment(self) -> bool:
        """Write a line that clients skip."""
        return self._write(b": %b\n\n" % self._comment_text().encode())

    @contextmanager
    def telling(self, what: Callable[[], str], seconds: float) -> Iterator[None]:
        """Inside, comments say `what()`, a line: now, and again every `seconds`, or as often as they came before."""
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
        """Whether the client is so far behind that more should wait."""
        return self._transport.get_write_buffer_size() > BACKLOG_BYTES

    async def drained(self, seconds: float) -> bool:
        """Wait until the client has caught up. If it reads nothing for `seconds` the connection is cut: False."""
        stall = StallTimer(self._transport, seconds)
        stall.start()
        try:
            await self._request.writer.drain()
        except ConnectionError:
            return False
        finally:
            stall.stop()
        return not self._transport.is_closing()

    async def finish(self) -> web.StreamResponse:
        """Send `[DONE]` and end the response; the handler returns what this returns."""
        self._stop_comments()
        with suppress(ConnectionError):  # the client left before the end; aiohttp notices on its own
            await self._response.write_eof(_DONE)
        return self._response

    def _write(self, text: bytes) -> bool:
        # uvloop raises, and asyncio warns, on a write after close.
        if self._transport.is_closing():
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(text), text) if self._is_chunked else text)
        self._last_write = self._loop.time()
        return True

    def _comment_if_silent(self) -> None:
        silence = self._loop.time() - self._last_write
        if silence >= self._comment_seconds and not self.is_backlogged:
            self.comment()
            silence = 0.0
        if not self._transport.is_closing():
            wait = max(self._comment_seconds - silence, 0.01)
            self._comment_timer = self._loop.call_later(wait, self._comment_if_silent)

    def _start_comments(self) -> None:
        self._stop_comments()
        self._comment_timer = self._loop.call_later(self._comment_seconds, self._comment_if_silent)

    def _stop_comments(self) -> None:
        if self._comment_timer is not None:
            self._comment_timer.cancel()
            self._comment_timer = None


def _keep_alive() -> str:
    return "keep-alive"

"""One client's connection: aiohttp's protocol with deadlines for slow clients and our own answer to malformed requests.

It knows when a request begins and ends, and nothing of what is in it.

What aiohttp (read: 3.14.5) does, and this class relies on: llhttp's strict mode refuses smuggling shapes;
`start()` lives as long as the connection is served, its handler included; `finish_response()` ends every request;
`handle_error()` answers malformed ones; `force_close()` closes at once; a handler is cancelled when the connection is
lost. What it does not do: end a connection whose headers stay unfinished or whose client stops reading, bound the
number of connections, or log a malformed request without its content, keys included.
"""

from __future__ import annotations

import asyncio
import logging
from typing import cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from brlite.config import LimitsConfig
from brlite.errors import InvalidRequest, NotReady, RequestTimeout
from brlite.http.boundary import has_begun
from brlite.http.connections import Connections
from brlite.http.envelope import error_bytes, error_response
from brlite.http.request_id import HEADER, new_request_id
from brlite.http.stall import StallTimer

logger = logging.getLogger(__name__)

MAX_HEADERS = 100
MALFORMED = "The request is not valid HTTP/1.1."
HEADERS_TOO_LARGE = web.HTTPRequestHeaderFieldsTooLarge
LINGERING_SECONDS = 5.0  # how long the rest of a refused body is read, so that the client can see the refusal


class Connection(web.RequestHandler):
    """A connection that cannot be held open by doing nothing. `HttpServer` makes it and says when a request begins."""

    __slots__ = (
        "_bytes_came",
        "_deadline",
        "_event_loop",
        "_is_retiring",
        "_is_serving",
        "_limits",
        "_siblings",
        "_stall",
        "_wire",
    )

    def __init__(
        self, server: web.Server, loop: asyncio.AbstractEventLoop, limits: LimitsConfig, siblings: Connections
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=limits.keepalive_seconds,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own way to have none, left out of its annotation
            logger=logger,
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            max_headers=MAX_HEADERS,
            lingering_time=LINGERING_SECONDS,
            auto_decompress=False,
        )
        self._event_loop = loop
        self._limits = limits
        self._siblings = siblings
        self._wire: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: StallTimer | None = None
        self._bytes_came = False
        self._is_serving = False
        self._is_retiring = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        wire = self._wire = cast(asyncio.Transport, transport)
        if not self._siblings.admit(self):
            wire.write(error_bytes(NotReady("Too many connections.", retry_after_seconds=1)))
            wire.close()
            return
        wire.set_write_buffer_limits(high=0)  # so pause_writing() means: the client does not take what we send
        self._stall = StallTimer(wire, self._limits.slow_client_seconds)
        self._set_deadline()
        super().connection_made(transport)

    async def start(self) -> None:
        """Serve the connection's requests, one after the other."""
        try:
            await super().start()
        finally:
            self._siblings.discard(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._clear_deadline()
        if self._stall is not None:
            self._stall.stop()
        super().connection_lost(exc)

    def retire(self) -> None:
        """Close now if no request is in progress, else after its response."""
        self._is_retiring = True
        if not self._is_serving:
            self.force_close()

    def abort(self) -> None:
        """Cut the connection, which cancels the handler."""
        if self._wire is not None:
            self._wire.abort()

    # A request: its first byte, its handler, its end

    def data_received(self, data: bytes) -> None:
        # aiohttp calls this without data too, to go on parsing.
        if data and not self._is_serving and not self._bytes_came:
            self._bytes_came = True
            self._set_deadline()
        super().data_received(data)

    def request_began(self) -> None:
        """The headers are complete and a handler takes over."""
        self._is_serving = True
        self._clear_deadline()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the response's end. The idle time that follows is bounded by `keepalive_timeout`."""
        if self._is_retiring:
            resp.force_close()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._is_serving = self._bytes_came = False

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a malformed request, or what the middlewares let through, without a word of what it contained."""
        if has_begun(request):
            raise ConnectionAbortedError("the answer had begun; nothing is sent twice")
        if status >= 500:
            logger.error("request from %s failed", request.remote, exc_info=exc)
            response = error_response(exc or RuntimeError())
        else:
            logger.info("malformed request from %s: %s", request.remote, type(exc).__name__)
            too_long = isinstance(exc, LineTooLong)
            response = error_response(
                HEADERS_TOO_LARGE() if too_long else InvalidRequest(MALFORMED, code="bad_request")
            )
        response.headers[HEADER] = new_request_id()
        response.force_close()
        return response

    def log_exception(self, *args: object, **kw: object) -> None:
        """aiohttp's own reports of what it did not foresee; a parser's error holds the request, so it is only named."""
        error = kw.get("exc_info")
        if isinstance(error, HttpProcessingError):
            logger.info("malformed request from %s: %s", self.peername, type(error).__name__)
        else:
            super().log_exception(*args, **kw)

    # Slow clients

    def _set_deadline(self) -> None:
        self._clear_deadline()
        self._deadline = self._event_loop.call_later(self._limits.header_seconds, self._header_time_is_up)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _header_time_is_up(self) -> None:
        if self._wire is not None and self._bytes_came and not self._wire.is_closing():
            logger.info("slow request headers from %s", self.peername)
            self._wire.write(error_bytes(RequestTimeout("The request headers did not arrive in time.")))
        self.force_close()

    def pause_writing(self) -> None:
        """The client does not take all that we send: from now on it must take some every `slow_client_seconds`."""
        super().pause_writing()
        if self._stall is not None:
            self._stall.start()

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._stall is not None:
            self._stall.stop()
        super().resume_writing()

"""One client's connection: aiohttp's protocol with deadlines for slow clients and our own answer to malformed requests.

It tracks when a request begins and ends, not its content. A fast path may get the bytes first and answer some requests
itself; it passes all others on to aiohttp.

Only this file uses undocumented behaviour of aiohttp (read in version 3.14.5). tests/http/test_aiohttp.py has a test
for each item:

- llhttp's strict mode refuses request smuggling;
- `RequestHandler`: `start()` lives as long as the connection is served, its handler included, and a handler is
  cancelled when the connection is lost; `finish_response()` ends every request; `handle_error()` answers malformed
  ones, too many headers with a `BadHttpMessage` of its own text; `force_close()` closes at once;
- `Server`: `request_factory` and `request_handler` may be replaced;
- `writer.output_size` counts the bytes of a response.

aiohttp does not close a connection whose headers stay incomplete or whose client stops reading. It does not bound the
number of connections. Its log of a malformed request shows the content, keys included.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, cast

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError, LineTooLong
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from brlite.config.options import LimitsConfig
from brlite.errors import InvalidRequest, NotFound, NotReady, RequestError, RequestTimeout
from brlite.http.connections import Connections
from brlite.http.errors import error_bytes, error_response
from brlite.http.request_id import HEADER, new_request_id
from brlite.http.stall import StallTimer

logger = logging.getLogger(__name__)

MAX_HEADERS = 100
MAX_SLASHES = 100  # in a path: aiohttp's router copies it once for each, 16,000 of them take 50 ms before the key check
MALFORMED = "The request is not valid HTTP/1.1."
MALFORMED_METHOD = "UNKNOWN"  # aiohttp's method for a head that cannot be parsed; no client can send it
TOO_MANY_HEADERS = "Too many headers"  # begins the text of aiohttp's error
LINGERING_SECONDS = 5.0  # how long the rest of a refused body is read, so that the client can see the refusal
NEVER_SECONDS = 10.0**8  # switches off aiohttp's idle timer, which ignores a fast path's requests

SPARE_SECONDS = 2.0  # time to send a probe's request on a connection beyond max_connections

# The host may be a name, an IPv4 address or an IPv6 one in brackets; a user name before it is not allowed in HTTP.
_ABSOLUTE_FORM = re.compile(
    r"https?://((?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?)([/?][!-~]*|)", re.IGNORECASE
)

SLOW_HEADERS = RequestTimeout("The request headers did not arrive in time.")
SLOW_BODY = RequestTimeout("The request body did not arrive in time.")
TOO_MANY = NotReady("Too many connections.", retry_after_seconds=1)


class ConnectionState(enum.Enum):
    """The state of a connection. Each event below is a method, which also sets the deadline of the new state.

    |              | bytes_came   | body_began   | request_began | request_ended | deadline (limits)      |
    |--------------|--------------|--------------|---------------|---------------|------------------------|
    | WAITING      | READING_HEAD | READING_BODY | SERVING       |               | keepalive_seconds (*)  |
    | READING_HEAD |              | READING_BODY | SERVING       |               | header_seconds         |
    | READING_BODY |              |              | SERVING       | WAITING       | body_seconds           |
    | SERVING      |              |              |               | WAITING       | none                   |

    (*) `header_seconds` before the first request. Only a fast path uses READING_BODY; aiohttp reads bodies in SERVING.
    """

    WAITING = enum.auto()
    READING_HEAD = enum.auto()
    READING_BODY = enum.auto()
    SERVING = enum.auto()


class ByteStreamHandler(Protocol):
    """Gets a connection's bytes, answers some requests itself, and passes all other bytes on.

    For each request that it answers, it calls the connection's `request_began` and `request_ended`.
    """

    def data_received(self, data: bytes) -> None: ...

    def request_ended(self) -> None:
        """aiohttp has answered a request that was passed on, and the connection stays open."""

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self) -> None: ...


MakeHandler = Callable[["Connection", asyncio.Transport], "ByteStreamHandler | None"]


class Connection(web.RequestHandler):
    """A connection with a deadline in each state but SERVING. `ServerHooks` calls `request_began`."""

    __slots__ = (
        "_deadline",
        "_event_loop",
        "_fast_path",
        "_is_malformed",
        "_limits",
        "_make_fast_path",
        "_siblings",
        "_stall",
        "_timeout_error",
        "_timer",
        "_wire",
        "is_draining",
        "is_spare",
        "state",
    )

    def __init__(
        self,
        server: web.Server,
        loop: asyncio.AbstractEventLoop,
        limits: LimitsConfig,
        siblings: Connections,
        make_fast_path: MakeHandler | None = None,
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=NEVER_SECONDS,
            access_log=None,  # type: ignore[arg-type]  # None switches it off; aiohttp's annotation lacks it
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
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = math.inf
        self._timeout_error: RequestError | None = None  # sent when the deadline passes; None sends nothing
        self._stall: StallTimer | None = None
        self._make_fast_path = make_fast_path
        self._fast_path: ByteStreamHandler | None = None
        self._is_malformed = False  # a request was malformed; all bytes after it are dropped
        self.state = ConnectionState.WAITING
        self.is_spare = False  # beyond max_connections: only probes are answered
        self.is_draining = False  # to be closed after the response in progress

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        wire = self._wire = cast(asyncio.Transport, transport)
        peer = wire.get_extra_info("peername")
        is_member = self._siblings.admit(self, peer[0] if isinstance(peer, tuple) else "")
        self.is_spare = self.is_draining = not is_member
        wire.set_write_buffer_limits(high=0)  # so pause_writing() means that the client does not read
        self._stall = StallTimer(wire, self._limits.slow_client_seconds)
        if self.is_spare:
            self._set_deadline(min(SPARE_SECONDS, self._limits.header_seconds), TOO_MANY)
        else:
            self._set_deadline(self._limits.header_seconds)
        if self._make_fast_path is not None and not self.is_spare:
            self._fast_path = self._make_fast_path(self, wire)
        super().connection_made(transport)

    async def start(self) -> None:
        """Serve the connection's requests, one after the other."""
        try:
            await super().start()
        finally:
            self._siblings.discard(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._fast_path is not None:
            self._fast_path.connection_lost()  # first, since the end of its request sets a new deadline
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._stall is not None:
            self._stall.stop()
        super().connection_lost(exc)

    @property
    def is_busy(self) -> bool:
        """Whether it has a request with complete headers."""
        return self.state in (ConnectionState.READING_BODY, ConnectionState.SERVING)

    def make_room(self) -> None:
        """Close now, to make room for another connection. Call it only if not `is_busy`."""
        if self._wire is not None and self.is_spare and not (self._is_malformed or self._wire.is_closing()):
            self._wire.write(error_bytes(TOO_MANY))
        self.force_close()

    def drain(self) -> None:
        """Close now if no request is in progress, else after its response."""
        self.is_draining = True
        if not self.is_busy:
            self.force_close()

    def abort(self) -> None:
        """Cut the connection, which cancels the handler."""
        if self._wire is not None:
            self._wire.abort()

    # The events of a request

    def data_received(self, data: bytes) -> None:
        if not data:  # aiohttp's call to continue parsing
            super().data_received(data)
        elif self._fast_path is not None:
            self._fast_path.data_received(data)
        elif not self._is_malformed:
            self.bytes_came()
            super().data_received(data)

    def pass_on(self, data: bytes) -> None:
        """Give the bytes to aiohttp."""
        if self._is_malformed:
            return
        if data:
            self.bytes_came()
        super().data_received(data)

    def bytes_came(self) -> None:
        """The first bytes of a request have arrived. All its headers must arrive within `header_seconds`."""
        if self.state is ConnectionState.WAITING and not self.is_spare:
            self.state = ConnectionState.READING_HEAD
            self._set_deadline(self._limits.header_seconds, SLOW_HEADERS)

    def body_began(self) -> None:
        """The headers are complete, and a fast path waits for the body."""
        self.state = ConnectionState.READING_BODY
        self._set_deadline(self._limits.body_seconds, SLOW_BODY)

    def request_began(self) -> None:
        """The headers are complete, and the request has a handler."""
        self.state = ConnectionState.SERVING
        self._deadline = math.inf

    def request_ended(self) -> None:
        """The response has been sent. The next request must begin within `keepalive_seconds`."""
        self.state = ConnectionState.WAITING
        self._siblings.is_idle(self)
        self._set_deadline(self._limits.keepalive_seconds)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the end of the response."""
        if self.is_draining:
            resp.force_close()
        try:
            finished = await super().finish_response(request, resp, start_time)
        finally:
            self.request_ended()
            if self._fast_path is not None and resp.keep_alive:
                self._fast_path.request_ended()
        if self._is_malformed and self._wire is not None and not self._wire.is_closing():
            # Closed now, it would be reset by bytes that still come, and the client might not see the response.
            with suppress(OSError):  # the client has left
                self._wire.write_eof()
            self._wire.resume_reading()
            await asyncio.sleep(LINGERING_SECONDS)  # cancelled when the client closes
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a malformed request, or an error that the middlewares did not catch, without quoting the request."""
        if has_begun(request):
            raise ConnectionAbortedError("the answer had begun; nothing is sent twice")
        if status >= 500:
            logger.error("request from %s failed", request.remote, exc_info=exc)
            response = error_response(exc or RuntimeError(), request.path)
        else:
            self._is_malformed = True
            logger.info("malformed request from %s: %s", request.remote, type(exc).__name__)
            is_too_large = isinstance(exc, LineTooLong) or (
                isinstance(exc, BadHttpMessage) and exc.message.startswith(TOO_MANY_HEADERS)
            )
            response = error_response(
                headers_too_large(self._limits.max_header_bytes)
                if is_too_large
                else InvalidRequest(MALFORMED, code="bad_request")
            )
        response.headers[HEADER] = new_request_id()
        response.force_close()
        return response

    def log_exception(self, *args: object, **kw: object) -> None:
        """Log an unexpected error of aiohttp. Of a parser error log only the name: its text contains the request."""
        error = kw.get("exc_info")
        if isinstance(error, HttpProcessingError):
            logger.info("malformed request from %s: %s", self.peername, type(error).__name__)
        else:
            super().log_exception(*args, **kw)

    # Slow clients

    def _set_deadline(self, seconds: float, timeout_error: RequestError | None = None) -> None:
        """Set or clear the deadline. A running timer that fires earlier is kept: it then checks the deadline."""
        self._timeout_error = timeout_error
        self._deadline = self._event_loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._event_loop.call_at(self._deadline, self._look_at_deadline)

    def _look_at_deadline(self) -> None:
        self._timer = None
        if self._deadline > self._event_loop.time():
            if self._deadline < math.inf:
                self._timer = self._event_loop.call_at(self._deadline, self._look_at_deadline)
            return
        if self._wire is not None and self._timeout_error is not None and not self._wire.is_closing():
            logger.info("slow request from %s", self.peername)
            self._wire.write(error_bytes(self._timeout_error))
        self.force_close()

    def pause_writing(self) -> None:
        """The send buffer is full. If the client reads nothing for `slow_client_seconds`, the connection is cut."""
        super().pause_writing()
        if self._stall is not None:
            self._stall.start()
        if self._fast_path is not None:
            self._fast_path.pause_writing()

    def resume_writing(self) -> None:
        """The send buffer is empty again."""
        if self._stall is not None:
            self._stall.stop()
        super().resume_writing()
        if self._fast_path is not None:
            self._fast_path.resume_writing()


class ServerHooks:
    """Hooks between aiohttp's server and the application: for each parsed head, and then for each request."""

    def __init__(self, server: web.Server, limits: LimitsConfig, probe_paths: frozenset[str]) -> None:
        self._make_request, server.request_factory = server.request_factory, self._read_request
        self._handle_request, server.request_handler = server.request_handler, self._begin_request
        self._max_header_bytes = limits.max_header_bytes
        self._probe_paths = probe_paths

    def _read_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        """Make aiohttp's request from a parsed head. A target in absolute form becomes a path and a `Host` header."""
        if message.method == MALFORMED_METHOD:
            message = message._replace(version=HttpVersion11)  # else aiohttp would respond in HTTP/1.0
        elif message.url.absolute:
            message = origin_form(message)
        if hdrs.UPGRADE in message.headers:
            # aiohttp's parser stops after it and may lose the next request, which would wait forever.
            message = message._replace(should_close=True)
        return self._make_request(message, payload, protocol, writer, task)

    async def _begin_request(self, request: web.BaseRequest) -> web.StreamResponse:
        """Call the connection's `request_began`, then pass the request on. A refused Expect header is answered here."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.request_began()
        if connection.is_spare and request.path not in self._probe_paths:
            return error_response(TOO_MANY, request.path)

        # Transfer-Encoding must be unambiguous. aiohttp's parser does not check that if there is an `Upgrade` header.
        codings = request.headers.getall(hdrs.TRANSFER_ENCODING, ())
        if request.version == HttpVersion11:
            is_clear = len(codings) <= 1 and all(coding.lower() == "chunked" for coding in codings)
        else:
            is_clear = request.version == HttpVersion10 and not codings
        if not is_clear or (request.raw_path[:1] != "/" and request.raw_path != "*"):
            response = error_response(InvalidRequest(MALFORMED, code="bad_request"), request.path)
            response.force_close()
            return response

        header_bytes = sum([len(name) + len(value) + 4 for name, value in request.raw_headers])
        if len(request.raw_path) + header_bytes > self._max_header_bytes:
            return error_response(headers_too_large(self._max_header_bytes), request.path)
        if request.raw_path.partition("?")[0].count("/") > MAX_SLASHES:
            return error_response(NotFound(f"unknown endpoint: {request.path[:200]}"), request.path)
        try:
            return await self._handle_request(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return error_response(error, request.path)


def headers_too_large(max_header_bytes: int) -> web.HTTPException:
    """The error for too many bytes or lines of headers."""
    return web.HTTPRequestHeaderFieldsTooLarge(
        reason=f"The request line and headers must have at most {max_header_bytes} bytes (limits.max_header_bytes) "
        f"and {MAX_HEADERS} header lines on this server."
    )


def origin_form(message: RawRequestMessage) -> RawRequestMessage:
    """Convert a request target in absolute form (RFC 9112 §3.2.2): the URL's path becomes the target, its host `Host`.

    Returns the message unchanged if the URL has an unusual form. The request is refused then.
    """
    found = _ABSOLUTE_FORM.fullmatch(message.path)
    if found is None:
        return message
    host, path = found.groups()
    if not path.startswith("/"):
        # RFC 9112 §3.2.4: OPTIONS without a path is for the server as a whole.
        path = "*" if message.method == hdrs.METH_OPTIONS and not path else f"/{path}"
    headers = CIMultiDict(message.headers)
    headers[hdrs.HOST] = host
    others = (field for field in message.raw_headers if field[0].lower() != b"host")
    return message._replace(
        path=path,
        url=URL(path, encoded=True),
        headers=CIMultiDictProxy(headers),
        raw_headers=((b"Host", host.encode()), *others),
    )


def has_begun(request: web.BaseRequest) -> bool:
    """Whether a byte of the response has been sent."""
    return request.writer.output_size > 0


async def invite_body(request: web.BaseRequest) -> None:
    """Send `100 Continue` if the client waits for it before it sends its body."""
    if request.version >= HttpVersion11 and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the final response has not begun

"""Listens on a port and serves an aiohttp application there, and ends it in good order.

It sets no signal handlers and knows no routes: who starts it decides when to close.
"""

from __future__ import annotations

import asyncio
import os
import re
from types import TracebackType

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from brlite.config.options import LimitsConfig
from brlite.errors import ConfigError, InvalidRequest
from brlite.http.connection import MALFORMED, TOO_MANY, Connection, MakeHandler
from brlite.http.connections import Connections
from brlite.http.errors import error_response

BACKLOG = 1024
MALFORMED_METHOD = "UNKNOWN"  # of aiohttp's stand-in for a request that cannot be parsed; no client can send it
LAST_WORDS_SECONDS = 1.0  # what handlers get, after the application's on_shutdown, to end their streams themselves

# The host may be a name, an IPv4 address or an IPv6 one in brackets; a user name before it is not allowed in HTTP.
_ABSOLUTE_FORM = re.compile(
    r"https?://((?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?)([/?][!-~]*|)", re.IGNORECASE
)
# What an application answers beyond max_connections too: how it is, for whoever runs it.
PROBE_PATHS: web.AppKey[frozenset[str]] = web.AppKey("probe_paths")


class HttpServer:
    """`async with HttpServer(app, host, port, limits) as server:` listens while inside; port 0 takes a free one.

    `close()` stops accepting, closes idle connections, waits `grace_seconds` for requests in progress, then runs the
    application's `on_shutdown`, and a second later cancels the handlers that are left. No task survives it.
    `make_fast_path` gives each connection a fast path, which answers some requests without the application.
    """

    def __init__(
        self,
        app: web.Application,
        host: str,
        port: int,
        limits: LimitsConfig,
        grace_seconds: float = 30.0,
        make_fast_path: MakeHandler | None = None,
    ) -> None:
        self._host, self._port = host, port
        self._limits = limits
        self._grace_seconds = grace_seconds
        self._make_fast_path = make_fast_path
        self._app = app
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,  # a client that leaves must free its work
            access_log=None,
            shutdown_timeout=LAST_WORDS_SECONDS,
        )
        self._connections = Connections(limits.max_connections, limits.max_connections_per_address)
        self._listener: asyncio.Server | None = None
        self._grace: asyncio.Task[bool] | None = None

    async def __aenter__(self) -> HttpServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Run the application's start-up and listen, or `ConfigError` if the address cannot be had."""
        self._app.on_shutdown.append(self._end_what_is_left)  # after the application's own
        await self._runner.setup()
        try:
            self._listener = await self._listen()
        except BaseException:
            await self._runner.cleanup()
            raise

    async def close(self) -> None:
        """Stop, as the class says. May be called twice."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        listener.close()
        self._connections.drain()
        self._grace = asyncio.create_task(self._connections.wait_gone(self._grace_seconds), name="brlite-grace")
        try:
            await asyncio.wait([self._grace])
        finally:
            self.end_grace()
            await self._runner.cleanup()

    def end_grace(self) -> None:
        """While `close` waits for requests in progress: end them now, streams with their event."""
        if self._grace is not None:
            self._grace.cancel()

    async def _end_what_is_left(self, app: web.Application) -> None:
        # aiohttp would cancel each handler twice, and the second time interrupts its cleaning up.
        if not await self._connections.wait_gone(LAST_WORDS_SECONDS):
            self._connections.abort()
            await self._connections.wait_gone(LAST_WORDS_SECONDS)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._address[1]

    @property
    def url(self) -> str:
        """Where to find it, such as `http://127.0.0.1:8000`."""
        host, port = self._address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def num_connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    @property
    def _address(self) -> tuple[str, int]:
        if self._listener is None:
            return self._host, self._port
        host, port = self._listener.sockets[0].getsockname()[:2]
        return str(host), int(port)

    async def _listen(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None  # set-up is done
        self._handle_request, server.request_handler = server.request_handler, self._begin_request
        self._make_request, server.request_factory = server.request_factory, self._read_request

        def connect() -> Connection:
            return Connection(server, loop, self._limits, self._connections, self._make_fast_path)

        try:
            return await loop.create_server(connect, self._host, self._port, backlog=BACKLOG)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {self._host}:{self._port}: {_reason(error)}") from None

    def _read_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        """aiohttp's request of a parsed head: one whose target is a whole URL becomes like any other."""
        if message.method == MALFORMED_METHOD:
            message = message._replace(version=HttpVersion11)  # aiohttp would answer as HTTP/1.0
        elif message.url.absolute:
            message = origin_form(message)
        if hdrs.UPGRADE in message.headers:
            # The parser stops there and may lose a request behind it, which would wait for ever.
            message = message._replace(should_close=True)
        return self._make_request(message, payload, protocol, writer, task)

    async def _begin_request(self, request: web.BaseRequest) -> web.StreamResponse:
        """Tell the connection, then pass the request on; a refused Expect header never reaches the middlewares."""
        assert isinstance(request.protocol, Connection)
        request.protocol.request_began()
        if request.protocol.is_spare and request.path not in self._app.get(PROBE_PATHS, ()):
            return error_response(TOO_MANY)
        if not _is_clear(request):
            return _refusal()
        if _header_bytes(request) > self._limits.max_header_bytes:
            return error_response(web.HTTPRequestHeaderFieldsTooLarge())
        try:
            return await self._handle_request(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return error_response(error)


def _header_bytes(request: web.BaseRequest) -> int:
    """About as many bytes as the request's head had."""
    return len(request.raw_path) + sum(len(name) + len(value) + 4 for name, value in request.raw_headers)


def origin_form(message: RawRequestMessage) -> RawRequestMessage:
    """The request whose target is a whole URL (RFC 9112 §3.2.2) with a path for a target and the URL's host as `Host`.

    As it is if there is anything odd about the URL, which `_is_clear` then refuses.
    """
    found = _ABSOLUTE_FORM.fullmatch(message.path)
    if found is None:
        return message
    host, path = found.groups()
    if not path.startswith("/"):
        # RFC 9112 §3.2.4: without a path, OPTIONS is meant for the server as a whole.
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


def _is_clear(request: web.BaseRequest) -> bool:
    """Whether it can mean one thing only, which aiohttp's parser does not make sure of beside an `Upgrade` header."""
    if not request.raw_path.startswith("/") and request.raw_path != "*":
        return False
    codings = request.headers.getall("Transfer-Encoding", ())
    if request.version == HttpVersion11:
        return all(coding.lower() == "chunked" for coding in codings) and len(codings) <= 1
    return request.version == HttpVersion10 and not codings


def _refusal() -> web.Response:
    response = error_response(InvalidRequest(MALFORMED, code="bad_request"))
    response.force_close()
    return response


def _reason(error: OSError | OverflowError) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)

"""Listens on a port, serves an aiohttp application there, and shuts it down gracefully.

It sets no signal handlers and adds no routes. The caller decides when to close it.
"""

from __future__ import annotations

import asyncio
import errno
import os

from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.errors import CannotListen
from brlite.files.quoting import one_line
from brlite.http.connection import Connection, MakeHandler, ServerHooks
from brlite.http.connections import Connections

BACKLOG = 1024
PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES)  # another port may work
LAST_WORDS_SECONDS = 1.0  # the time of handlers to end their streams after the application's on_shutdown

# Paths that are answered even beyond max_connections: health and readiness.
PROBE_PATHS: web.AppKey[frozenset[str]] = web.AppKey("probe_paths")


class HttpServer:
    """`async with HttpServer(app, host, port, limits) as server:` listens inside the block; port 0 means any free port.

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
            handler_cancellation=True,  # a disconnect must end the request's work
            access_log=None,
            shutdown_timeout=LAST_WORDS_SECONDS,
        )
        self._connections = Connections(limits.max_connections, limits.max_connections_per_address)
        self._listener: asyncio.Server | None = None
        self._grace: asyncio.Task[bool] | None = None

    async def __aenter__(self) -> HttpServer:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Run the application's startup and listen. Raises `CannotListen` if it cannot listen on the address."""
        self._app.on_shutdown.append(self._end_what_is_left)  # after the application's own
        await self._runner.setup()
        try:
            self._listener = await self._listen()
        except BaseException:
            await self._runner.cleanup()
            raise

    async def close(self) -> None:
        """Shut down in the steps that the class describes. May be called twice."""
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
        """Stop the wait of `close` for requests in progress. They end now, streams with an error event."""
        if self._grace is not None:
            self._grace.cancel()

    async def _end_what_is_left(self, app: web.Application) -> None:
        # aiohttp would cancel each handler twice; the second time would interrupt its cleanup.
        if not await self._connections.wait_gone(LAST_WORDS_SECONDS):
            self._connections.abort()
            await self._connections.wait_gone(LAST_WORDS_SECONDS)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._address[1]

    @property
    def url(self) -> str:
        """The server's URL, such as `http://127.0.0.1:8000`."""
        host, port = self._address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def num_connections(self) -> int:
        """The number of open connections."""
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
        ServerHooks(server, self._limits, self._app.get(PROBE_PATHS, frozenset[str]()))

        def connect() -> Connection:
            return Connection(server, loop, self._limits, self._connections, self._make_fast_path)

        try:
            return await loop.create_server(connect, self._host, self._port, backlog=BACKLOG)
        except (OSError, OverflowError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
                reason = os.strerror(error.errno)
            elif isinstance(error, UnicodeError):
                reason = "this is no host name"
            else:
                reason = getattr(error, "strerror", None) or str(error)
            remedy = "; --port takes another one" if getattr(error, "errno", None) in PORT_ERRORS else ""
            raise CannotListen(f"cannot listen on {one_line(self._host)}:{self._port}: {reason}{remedy}") from None

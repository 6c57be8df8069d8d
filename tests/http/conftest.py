"""A real server on a free port, and a client that sends bytes as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.http.keys import ApiKeys
from brlite.http.listen import PROBE_PATHS, HttpServer
from brlite.http.middlewares import add_middlewares
from brlite.http.origin_policy import OriginPolicy
from tests.limits import PATIENCE_SECONDS

# A test that is about a time limit sets that one; the others are not to be met on a slow machine.
PATIENT = dict.fromkeys(
    ("header_seconds", "body_seconds", "keepalive_seconds", "slow_client_seconds"), PATIENCE_SECONDS
)

HttpServerFactory = Callable[..., Awaitable[HttpServer]]


@pytest.fixture
async def http_server() -> AsyncIterator[HttpServerFactory]:
    """`await http_server({"POST /echo": handler}, header_seconds=0.2)` starts one; it is closed for you."""
    servers: list[HttpServer] = []

    async def start(
        routes: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]],
        *,
        keys: tuple[str, ...] = (),
        cors_origins: tuple[str, ...] = (),
        grace_seconds: float = 0.2,
        prefix: str = "",
        **limits: float,
    ) -> HttpServer:
        app = web.Application()
        for route, handler in routes.items():
            app.router.add_route(*route.split(), handler)
        open_paths = frozenset({"/health"})
        policy = OriginPolicy(cors_origins)
        add_middlewares(app, keys=ApiKeys(keys), open_paths=open_paths, origin_policy=policy, quiet_paths=open_paths)
        app[PROBE_PATHS] = open_paths
        server = HttpServer(mounted(app, prefix), "127.0.0.1", 0, LimitsConfig(**PATIENT | limits), grace_seconds)
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        await server.close()
        assert server.num_connections == 0


def mounted(app: web.Application, prefix: str) -> web.Application:
    """The application inside another one, if there is a prefix."""
    if not prefix:
        return app
    outer = web.Application()
    outer.add_subapp(prefix, app)
    return outer


class RawClient:
    """One TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        try:
            return await asyncio.wait_for(self.reader.read(), PATIENCE_SECONDS)
        except ConnectionResetError:
            return b""

    async def until(self, mark: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(mark), PATIENCE_SECONDS)

    async def answer(self) -> tuple[bytes, bytes]:
        """The next answer with a Content-Length: head and body."""
        head = await self.until(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        return head, await asyncio.wait_for(self.reader.readexactly(length), PATIENCE_SECONDS)


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[HttpServer], Awaitable[RawClient]]]:
    clients: list[RawClient] = []

    async def open_connection(server: HttpServer) -> RawClient:
        client = RawClient(*await asyncio.open_connection("127.0.0.1", server.port, limit=2**24))
        clients.append(client)
        return client

    yield open_connection
    for client in clients:
        client.writer.transport.abort()


async def hello(request: web.Request) -> web.Response:
    return web.Response(text="hello")


@pytest.fixture(name="hello")
def hello_handler() -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A handler that answers `hello`."""
    return hello

"""What `http/connection.py` takes of aiohttp beyond its documentation: a test for each, so that an upgrade shows it."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from brlite.config.options import LimitsConfig
from brlite.http import connection
from brlite.http.body import leave_body
from brlite.http.listen import HttpServer
from tests.limits import PATIENCE_SECONDS

GET = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"


class Calls(list[str]):
    """Which of aiohttp's methods were called, in order, and that coroutines came to their end."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    def note(self, name: str) -> None:
        self.append(name)
        self._changed.set()

    async def until(self, name: str) -> None:
        while name not in self:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), PATIENCE_SECONDS)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def watch(name: str) -> None:
        original = getattr(RequestHandler, name)

        async def run(self: RequestHandler, *args: object, **more: object) -> object:
            calls.note(name)
            try:
                return await original(self, *args, **more)
            finally:
                calls.note(f"{name} ended")

        def call(self: RequestHandler, *args: object, **more: object) -> object:
            calls.note(name)
            return original(self, *args, **more)

        monkeypatch.setattr(RequestHandler, name, run if inspect.iscoroutinefunction(original) else call)

    for name in ("start", "finish_response"):
        watch(name)
    return calls


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("connection_made", ["transport"]),
        ("connection_lost", ["exc"]),
        ("data_received", ["data"]),
        ("pause_writing", []),
        ("resume_writing", []),
        ("start", []),
        ("force_close", []),
        ("finish_response", ["request", "resp", "start_time"]),
        ("handle_error", ["request", "status", "exc", "message"]),
        ("log_exception", ["args", "kw"]),
    ],
)
def test_a_method_that_is_overridden_or_called_has_these_parameters(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(RequestHandler, method)).parameters)[1:] == parameters


@pytest.mark.parametrize(
    "parameter",
    [
        *("loop", "keepalive_timeout", "access_log", "logger", "max_line_size", "max_field_size", "max_headers"),
        *("lingering_time", "auto_decompress"),
    ],
)
def test_a_connection_can_be_made_with_these_arguments(parameter: str) -> None:
    assert parameter in inspect.signature(RequestHandler.__init__).parameters


@pytest.mark.parametrize("field", ["method", "path", "version", "headers", "raw_headers", "should_close", "url"])
def test_a_parsed_head_has_the_fields_that_are_read_or_replaced(field: str) -> None:
    assert hasattr(RawRequestMessage, field)
    assert hasattr(RawRequestMessage, "_replace")


async def test_start_lives_as_long_as_the_connection_and_each_response_is_finished_in_it(
    seen: Calls, http_server, connect, hello
) -> None:
    client = await connect(await http_server({"GET /hello": hello}))

    for _ in range(2):
        client.send(GET)
        await client.answer()
    before_close = list(seen)
    client.writer.close()
    await seen.until("start ended")

    assert before_close == ["start", *["finish_response", "finish_response ended"] * 2]


async def test_a_handler_is_cancelled_in_start_when_the_connection_is_lost(seen: Calls, http_server, connect) -> None:
    cancelled: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
    is_running = asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        is_running.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set_result(list(seen))
        raise AssertionError

    client = await connect(await http_server({"GET /hello": wait}))
    client.send(GET)
    await is_running.wait()
    client.writer.transport.abort()

    assert "start ended" not in await asyncio.wait_for(cancelled, PATIENCE_SECONDS)


async def test_a_malformed_request_has_a_method_of_its_own_and_is_answered_by_handle_error(
    http_server, connect, hello, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods: list[str] = []
    read_request = connection.ServerHooks._read_request

    def note(self: connection.ServerHooks, message: RawRequestMessage, *args: object) -> web.BaseRequest:
        methods.append(message.method)
        return read_request(self, message, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(connection.ServerHooks, "_read_request", note)
    client = await connect(await http_server({"GET /hello": hello}))

    client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n")
    _, body = await client.answer()

    assert methods == [connection.MALFORMED_METHOD]
    assert connection.MALFORMED.encode() in body


async def test_force_close_closes_at_once(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello}, header_seconds=0.05)

    client = await connect(server)  # the deadline of its headers ends in `force_close`

    assert await client.rest() == b""


async def test_the_bytes_of_a_response_are_counted_from_its_headers_on(http_server, connect) -> None:
    counts: list[bool] = []

    async def count(request: web.Request) -> web.StreamResponse:
        counts.append(connection.has_begun(request))
        response = web.StreamResponse()
        await response.prepare(request)
        counts.append(connection.has_begun(request))
        await response.write_eof()
        return response

    client = await connect(await http_server({"GET /hello": count}))
    client.send(GET)
    await client.until(b"\r\n\r\n0\r\n\r\n")

    assert counts == [False, True]


async def test_the_count_can_be_set_back_after_100_continue(connect) -> None:
    counts: list[bool] = []

    async def count(request: web.Request) -> web.StreamResponse:
        await connection.invite_body(request)
        counts.append(connection.has_begun(request))
        return web.Response(text=await request.text())

    app = web.Application()
    app.router.add_route("POST", "/hello", count, expect_handler=leave_body)
    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig(), 0.2) as server:
        client = await connect(server)
        client.send(b"POST /hello HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
        await client.until(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.send(b"x")

        assert (await client.answer())[1] == b"x"
    assert counts == [False]


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 1\r\nContent-Length: 2\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"X : y\r\n",
        b"X: a\r\n folded\r\n",
    ],
)
async def test_shapes_that_smuggle_are_refused(headers: bytes, http_server, connect, hello) -> None:
    client = await connect(await http_server({"GET /hello": hello}))

    client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n0\r\n\r\n")

    assert (await client.rest()).startswith(b"HTTP/1.1 400 ")

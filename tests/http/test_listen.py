"""Listening, and closing in good order."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.dialects.sse import DONE_EVENT, frame
from brlite.errors import ConfigError
from brlite.http.events import EventStream
from brlite.http.listen import HttpServer

GET = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"


def server_for(app: web.Application, port: int = 0, host: str = "127.0.0.1") -> HttpServer:
    return HttpServer(app, host, port, LimitsConfig(), grace_seconds=0.2)


async def test_a_free_port_is_taken_and_told() -> None:
    async with server_for(web.Application()) as server:
        url = server.url

    assert url == f"http://127.0.0.1:{url.rpartition(':')[2]}"
    assert int(url.rpartition(":")[2]) > 0


async def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        reason = rf"^cannot listen on 127\.0\.0\.1:{port}: Address already in use; --port takes another one$"
        with pytest.raises(ConfigError, match=reason):
            await server_for(web.Application(), port).start()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("203.0.113.1", 0), ("no such host", 0)])
async def test_an_impossible_address_is_one_clear_line(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=rf"^cannot listen on {host}:{port}: \w"):
        await server_for(web.Application(), port, host).start()


async def test_closing_waits_for_the_request_in_progress_and_closes_the_idle_connection(http_server, connect) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        began.set()
        await go_on.wait()
        return web.Response(text="done")

    server = await http_server({"GET /x": handler}, grace_seconds=10)
    idle, busy = await connect(server), await connect(server)
    busy.send(GET)
    await began.wait()
    closing = asyncio.create_task(server.close())
    idle_rest = await idle.rest()
    go_on.set()
    answer = await busy.rest()
    await closing

    assert idle_rest == b""
    assert answer.endswith(b"done")
    assert b"Connection: close" in answer


async def test_closing_refuses_new_connections(http_server, connect, hello) -> None:
    server = await http_server({"GET /x": hello})
    port = server.port
    await server.close()

    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_handlers_that_outlast_the_grace_are_cancelled_and_no_task_is_left(http_server, connect) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            cancelled.set()
        raise AssertionError

    before = asyncio.all_tasks()
    server = await http_server({"GET /x": handler}, grace_seconds=0.05)
    client = await connect(server)
    client.send(GET)
    await began.wait()
    await server.close()

    assert cancelled.is_set()
    assert asyncio.all_tasks() == before


async def test_on_shutdown_may_end_the_streams_itself(connect) -> None:
    stop, began = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=60) as events:
            began.set()
            await stop.wait()
            events.write(frame(b'{"error":{}}'))
            return await events.finish(DONE_EVENT)

    async def on_shutdown(app: web.Application) -> None:
        stop.set()

    app = web.Application()
    app.router.add_get("/x", handler)
    app.on_shutdown.append(on_shutdown)
    server = server_for(app)
    await server.start()
    client = await connect(server)
    client.send(GET)
    await began.wait()
    await server.close()

    assert (await client.rest()).endswith(b'data: {"error":{}}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n')


async def test_two_servers_live_in_one_process(http_server, connect, hello) -> None:
    first, second = await http_server({"GET /x": hello}), await http_server({"GET /x": hello})
    await first.close()
    client = await connect(second)

    client.send(GET)

    assert (await client.answer())[1] == b"hello"

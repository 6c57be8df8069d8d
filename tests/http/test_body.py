"""Bodies that are too large, too slow, cut, compressed or not JSON."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.http.body import leave_body, read_body
from tests.limits import PATIENCE_SECONDS

JSON = b"Content-Type: application/json\r\n"


def post(headers: bytes, body: bytes = b"") -> bytes:
    return b"POST /echo HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n" + body


async def echo(request: web.Request) -> web.Response:
    return web.Response(
        body=await read_body(request, LimitsConfig(max_body_bytes=100_000, body_seconds=PATIENCE_SECONDS))
    )


async def echo_soon(request: web.Request) -> web.Response:
    return web.Response(body=await read_body(request, LimitsConfig(max_body_bytes=100_000, body_seconds=0.3)))


@pytest.fixture
async def client(http_server, connect):
    return await connect(await http_server({"POST /echo": echo}))


async def test_a_body_that_came_with_its_headers_is_read(client) -> None:
    client.send(post(JSON + b"Content-Length: 2\r\n", b"{}"))

    head, body = await client.answer()

    assert (head[9:12], body) == (b"200", b"{}")


async def test_a_body_in_pieces_is_read(client) -> None:
    client.send(post(JSON + b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n"))
    await asyncio.sleep(0)
    client.send(b"2\r\nde\r\n0\r\n\r\n")

    _, body = await client.answer()

    assert body == b"abcde"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"", b"200"),
        (b"Content-Type: application/json; charset=utf-8\r\n", b"200"),
        (b"Content-Type: APPLICATION/JSON\r\n", b"200"),
        (b"Content-Type: application/vnd.api+json\r\n", b"200"),
        (b"Content-Encoding: identity\r\n", b"200"),
        (b"Content-Type: application/x-www-form-urlencoded\r\n", b"415"),
        (b"Content-Type: text/plain\r\n", b"415"),
        (b"Content-Type: multipart/form-data; boundary=x\r\n", b"415"),
        (b"Content-Type: \r\n", b"415"),
        (JSON + b"Content-Encoding: gzip\r\n", b"415"),
        (JSON + b"Content-Encoding: br\r\n", b"415"),
        (JSON + b"Content-Encoding: unknown\r\n", b"415"),
    ],
)
async def test_only_plain_json_is_accepted(headers: bytes, status: bytes, client) -> None:
    client.send(post(headers + b"Content-Length: 2\r\n", b"{}"))

    head, _ = await client.answer()

    assert head[9:12] == status


async def test_a_refused_type_is_told_what_to_send(client) -> None:
    client.send(post(b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 2\r\n", b"{}"))

    _, body = await client.answer()

    assert b"'Content-Type: application/json'" in body


async def test_64_mb_are_refused_before_they_are_sent(client) -> None:
    client.send(post(JSON + b"Content-Length: 67108864\r\n"))

    head, body = await client.answer()

    assert head[9:12] == b"413"
    assert b"100000 bytes" in body


async def test_a_chunked_body_is_counted(client) -> None:
    client.send(post(JSON + b"Transfer-Encoding: chunked\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"))
    client.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")

    head, _ = await client.answer()

    assert head[9:12] == b"413"


async def test_a_slow_body_gets_408(http_server, connect) -> None:
    client = await connect(await http_server({"POST /echo": echo_soon}))

    client.send(post(JSON + b"Content-Length: 100\r\n", b"{"))

    head, body = await client.answer()

    assert head[9:12] == b"408"
    assert b"\r\nX-Should-Retry: true\r\n" in head
    assert b"did not arrive within 0.3 s" in body


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"-1\r\n", b"3\r\nabcdef\r\n", b"1;a=\x00\r\nx\r\n"])
async def test_a_badly_framed_chunk_is_never_a_body(chunk: bytes, http_server, connect) -> None:
    client = await connect(await http_server({"POST /echo": echo_soon}))
    client.send(post(JSON + b"Transfer-Encoding: chunked\r\n"))
    await asyncio.sleep(0.02)  # the handler is to be waiting for the body
    client.send(chunk)

    head, _ = await client.answer()

    # aiohttp does not tell the reader of a body that its framing broke: then the time limit ends it.
    assert head[9:12] in (b"400", b"408")


async def test_after_a_body_the_idle_connection_has_its_keep_alive_time(http_server, connect) -> None:
    client = await connect(await http_server({"POST /echo": echo}, header_seconds=1.0))

    client.send(post(JSON + b"Content-Length: 2\r\n", b"{}"))
    await client.answer()
    await asyncio.sleep(1.2)  # longer than headers may take
    client.send(post(JSON + b"Content-Length: 2\r\n", b"{}"))
    head, _ = await client.answer()

    assert head[9:12] == b"200"


async def test_a_client_that_cuts_its_body_short_leaves_no_trace(http_server, connect, caplog) -> None:
    ended = asyncio.Event()

    async def read(request: web.Request) -> web.Response:
        try:
            return await echo(request)
        finally:
            ended.set()

    client = await connect(await http_server({"POST /echo": read}))
    client.send(post(JSON + b"Content-Length: 100\r\n", b"{"))
    client.writer.close()
    await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)

    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_100k_chunks_of_one_byte_are_read_while_others_are_served(http_server, connect, hello) -> None:
    server = await http_server({"POST /echo": echo, "GET /hello": hello})
    slow, other = await connect(server), await connect(server)
    slow.send(post(JSON + b"Transfer-Encoding: chunked\r\n", b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n"))

    other.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
    _, hello_body = await other.answer()
    head, body = await slow.answer()

    assert hello_body == b"hello"
    assert (head[9:12], len(body)) == (b"200", 100_000)


@pytest.mark.parametrize(("length", "status"), [(2, b"HTTP/1.1 100 Continue"), (200_000, b"HTTP/1.1 413")])
async def test_a_client_that_asks_first_is_told_before_it_sends(length, status, connect) -> None:
    from brlite.config.options import LimitsConfig
    from brlite.http.keys import ApiKeys
    from brlite.http.listen import HttpServer
    from brlite.http.middlewares import add_middlewares

    app = web.Application()
    add_middlewares(app, keys=ApiKeys(), open_paths=frozenset())
    app.router.add_post("/echo", echo, expect_handler=leave_body)
    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig(), grace_seconds=0.1) as server:
        client = await connect(server)
        client.send(post(JSON + b"Expect: 100-continue\r\nContent-Length: %d\r\n" % length))
        first = await client.until(b"\r\n\r\n")
        if first.startswith(b"HTTP/1.1 100"):
            client.send(b"{}")
            assert (await client.answer())[1] == b"{}"

    assert first.startswith(status)

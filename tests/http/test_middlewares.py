"""CORS, request ids and the access log together, in the order that `add_middlewares` gives them."""

from __future__ import annotations

import logging
import re

import pytest
from aiohttp import web

from brlite.http.access_log import log_extras
from brlite.http.events import EventStream
from brlite.http.request_id import request_id

PREFLIGHT = (
    b"OPTIONS /v1/chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: %b\r\n"
    b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization,x-stainless-os\r\n\r\n"
)


async def test_a_preflight_needs_no_key(http_server, connect, hello) -> None:
    server = await http_server({"POST /v1/chat": hello}, keys=("k",), cors_origins=("https://a.example",))
    client = await connect(server)

    client.send(PREFLIGHT % b"https://a.example")
    answer = await client.rest()

    assert answer.startswith(b"HTTP/1.1 204 ")
    assert b"Access-Control-Allow-Origin: https://a.example\r\n" in answer
    assert b"Access-Control-Allow-Headers: authorization,x-stainless-os\r\n" in answer
    assert b"Access-Control-Max-Age: 600\r\n" in answer
    assert b"Vary: Origin\r\n" in answer


@pytest.mark.parametrize("origin", [b"https://b.example", b"null", b"https://a.example.evil", b"HTTPS://A.EXAMPLE"])
async def test_a_foreign_page_gets_no_leave(origin: bytes, http_server, connect, hello) -> None:
    server = await http_server({"POST /v1/chat": hello}, keys=("k",), cors_origins=("https://a.example",))
    client = await connect(server)

    client.send(PREFLIGHT % origin)
    answer = await client.rest()

    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"Access-Control-Allow-Origin" not in answer


async def test_without_origins_there_is_no_cors(http_server, connect, hello) -> None:
    server = await http_server({"POST /v1/chat": hello})
    client = await connect(server)

    client.send(PREFLIGHT % b"https://a.example")
    answer = await client.rest()

    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"Access-Control" not in answer


@pytest.mark.parametrize("is_asked", [False, True])
async def test_a_page_that_may_ask_may_ask_a_server_of_a_private_network(is_asked, http_server, connect, hello) -> None:
    server = await http_server({"POST /v1/chat": hello}, cors_origins=("https://a.example",))
    client = await connect(server)
    wish = b"\r\nAccess-Control-Request-Private-Network: true\r\n\r\n" if is_asked else b"\r\n\r\n"

    client.send(PREFLIGHT.replace(b"\r\n\r\n", wish) % b"https://a.example")
    answer = await client.rest()

    assert answer.startswith(b"HTTP/1.1 204 ")
    assert (b"Access-Control-Allow-Private-Network: true\r\n" in answer) is is_asked


async def test_any_page_may_read_answers_and_errors_with_a_star(http_server, connect, hello) -> None:
    server = await http_server({"GET /x": hello}, keys=("k",), cors_origins=("*",))
    client = await connect(server)

    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\nOrigin: https://b.example\r\n\r\n")
    refused, _ = await client.answer()
    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\nOrigin: https://b.example\r\nX-Api-Key: k\r\n\r\n")
    accepted, _ = await client.answer()

    assert refused.startswith(b"HTTP/1.1 401")
    assert b"Access-Control-Allow-Origin: *\r\n" in refused
    assert b"Access-Control-Allow-Origin: *\r\n" in accepted
    assert b"Access-Control-Expose-Headers: X-Request-Id, Retry-After\r\n" in accepted


@pytest.mark.parametrize("sent", ["abc-1_2.3", "a" * 128])
async def test_a_harmless_request_id_goes_back_and_ours_is_another_each_time(sent: str, http_server, connect) -> None:
    async def tell(request: web.Request) -> web.Response:
        return web.Response(text=request_id(request))

    client = await connect(await http_server({"GET /x": tell}))

    client.send(f"GET /x HTTP/1.1\r\nHost: x\r\nX-Request-Id: {sent}\r\n\r\n".encode())
    head, body = await client.answer()

    client.send(f"GET /x HTTP/1.1\r\nHost: x\r\nX-Request-Id: {sent}\r\n\r\n".encode())
    _, again = await client.answer()

    assert f"X-Request-Id: {sent}\r\n".encode() in head
    assert len({sent.encode(), body, again}) == 3


@pytest.mark.parametrize("sent", ["", "a b", "a" * 129, "<script>", "a\tb", "\xff", "a,b"])
async def test_any_other_request_id_is_replaced(sent: str, http_server, connect, hello) -> None:
    client = await connect(await http_server({"GET /x": hello}))

    client.send(f"GET /x HTTP/1.1\r\nHost: x\r\nX-Request-Id: {sent}\r\n\r\n".encode("latin-1"))
    head, _ = await client.answer()

    made = head.partition(b"X-Request-Id: ")[2].partition(b"\r\n")[0]
    assert len(made) == 32
    assert int(made, 16) > 0


async def test_streams_and_unknown_paths_carry_the_id_too(http_server, connect) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=10) as events:
            return await events.finish()

    client = await connect(await http_server({"GET /x": stream}))

    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\nX-Request-Id: one\r\n\r\n")
    streamed = await client.until(b"0\r\n\r\n")
    client.send(b"GET /y HTTP/1.1\r\nHost: x\r\nX-Request-Id: two\r\n\r\n")
    unknown, _ = await client.answer()

    assert b"X-Request-Id: one\r\n" in streamed
    assert b"X-Request-Id: two\r\n" in unknown


async def test_a_request_is_one_line_with_what_the_handler_noted(http_server, connect, caplog) -> None:
    caplog.set_level(logging.INFO, "brlite.access")

    async def handler(request: web.Request) -> web.Response:
        log_extras(request).update(model="a\nb", prompt_tokens=12)
        return web.Response(status=202)

    client = await connect(await http_server({"POST /x": handler}))
    client.send(b"POST /x?secret=1 HTTP/1.1\r\nHost: x\r\nX-Request-Id: abc\r\n\r\n")
    await client.answer()

    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("127.0.0.1 POST /x 202 ")
    assert re.search(r" ms id=[0-9a-f]{32} model=a\\nb prompt_tokens=12 client_id=abc$", line)


async def test_a_path_cannot_forge_a_line(http_server, connect, caplog) -> None:
    caplog.set_level(logging.INFO, "brlite.access")
    client = await connect(await http_server({}))

    client.send(b"GET /%0d%0aforged" + b"a" * 1000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    await client.rest()

    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("127.0.0.1 GET /%0d%0aforgedaaa")
    assert "\n" not in line
    assert len(line) < 400


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_probes_are_not_logged(prefix, http_server, connect, hello, caplog) -> None:
    caplog.set_level(logging.INFO, "brlite.access")
    client = await connect(await http_server({"GET /health": hello}, prefix=prefix))

    client.send(f"GET {prefix}/health HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await client.answer()

    assert caplog.records == []

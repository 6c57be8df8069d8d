"""Both doors, aiohttp's and the proxy's fast path before it, give the same answer to every first line, as soon."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest

from brlite.config.options import UpstreamConfig
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Client
from tests.proxy.services import free_port

# What has come when nothing more does: some of it can become a request, some never can.
FIRST_BYTES = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello: somebody wrote https://
    b"\x16",
    b"\x80\x2e\x01\x03\x01",  # one of SSL 2
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"PRI",
    b"\x05\x01\x00",  # SOCKS
    b"\x00",
    b"\x00\x00\x00\x00",
    b"hello\r\n",
    b"hello",
    b"\xff\xfe",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b" GET / HTTP/1.1\r\n",
    b"G",
    b"GE",
    b"GET",
    b"GET ",
    b"GET /",
    b"GET /health",
    b"GET /health HTTP",
    b"GET /health HTTP/1.1",
    b"GET /health HTTP/1.1\r",
    b"GET /health HTTP/1.1\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nA",
    b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\r\n\r",
    b"GET /health HTTP/1.1\nHost: x\n\n",
    b"GET /health HTTP/1.1\nHost",
    b"GET /health\r\n",
    b"GET  /health",
    b"GET\t/health",
    b"GET /heal th HTTP/1.1",
    b"GET /\x00",
    b"GET /\xe6\xb0\xb4",
    b"GET /health HTTQ",
    b"GET /health HTTP/1.2\r\n",
    b"GET /health HTTP/2.0\r\n",
    b"GET /health HTTP/3",
    b"GET /health HTTP/0.9\r\n",
    b"GET /health HTTP/11",
    b"GETT /health",
    b"get /health",
    b"Get /health",
    b"FOO /health",
    b"QUERY /health HTTP/1.1\r\n",
    b"PROPFIND /health HTTP/1.1\r\n",
    b"CONNECT x:443 HTTP/1.1\r\n",
    b"CONNECT ",
    b"OPTIONS *",
    b"OPTIONS * HTTP/1.1\r\n",
    b"GET *",
    b"GET http",
    b"GET http://127.0.0.1/health HTTP/1.1\r\n",
    b"GET HTTP://x:80/health HTTP/1.1\r\n",
    b"GET ftp://x/health HTTP/1.1\r\n",
    b"GET health",
    b"GET ?",
    b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent",
    b"GET /health HTTP/1.1\r\n folded",
    b"GET /health HTTP/1.1\r\n: x",
    b"GET /health HTTP/1.1\r\nA B",
    b"GET /health HTTP/1.1\r\nHost : x",
    b"GET /health HTTP/1.1\r\nHost: \x00",
    b"GET /health HTTP/1.1\r\nHost: x\rA",
    b"GET /health HTTP/1.1\r\nHost: x\nA",
    b"GET /health HTTP/1.1\r\nHo\xc3\xb6st: x",
]
# First lines of requests that are whole.
WHOLE = [
    b"GET /health HTTP/1.1",
    b"GET /health HTTP/1.0",
    b"HEAD /health HTTP/1.1",
    b"HEAD /version HTTP/1.1",
    b"GET /none HTTP/1.1",
    b"POST /health HTTP/1.1",
    b"DELETE /v1/models HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"GET http://x/health HTTP/1.1",
    b"GET http://x:8000/health?a=b HTTP/1.1",
    b"GET http://[::1]:8000/health HTTP/1.1",
    b"GET HTTPS://X/health HTTP/1.1",
    b"GET http://127.0.0.1/version HTTP/1.0",
    b"GET http://x HTTP/1.1",
    b"GET http://x?q HTTP/1.1",
    b"OPTIONS http://x HTTP/1.1",
    b"GET http:///health HTTP/1.1",
    b"GET http://user@x/health HTTP/1.1",
    b"GET http://x:y/health HTTP/1.1",
    b"GET http:/health HTTP/1.1",
    b"GET ftp://x/health HTTP/1.1",
    b"GET //x/health HTTP/1.1",
    b"CONNECT x:443 HTTP/1.1",
    b"PROPFIND /health HTTP/1.1",
    b"GET /health HTTP/1.2",
    b"GET /health HTTP/2.0",
    b"GET /health#part HTTP/1.1",
]

Doors = tuple[int, int]


@pytest.fixture
async def doors() -> AsyncIterator[Doors]:
    """The ports of a server without upstreams, all of whose requests are aiohttp's, and of one with them."""
    upstream = UpstreamConfig(url=f"http://127.0.0.1:{free_port()}", models=("m",), health_path="")
    async with run_proxy() as aiohttp, run_proxy(upstream) as fast_path:
        yield aiohttp.port, fast_path.port


async def at_once(port: int, data: bytes) -> bytes | None:
    """What comes for these bytes without more of them, long before any deadline; None if nothing does."""
    client = await Client.connect(port)
    client.send(data)
    probe = await Client.connect(port)
    reading = asyncio.ensure_future(client.reader.read(2**16))
    for _ in range(3):  # by the time that others are answered, it would have come
        probe.send(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await asyncio.wait_for(probe.answer(), PATIENCE_SECONDS)
    for each in (client, probe):
        each.leave()
    return same(await reading) if reading.done() else reading.cancel() and None


def same(answer: bytes) -> bytes:
    """An answer without what differs each time."""
    return re.sub(rb"\r\n(?:Date|X-Request-Id): [^\r]*", b"", answer)


async def whole(port: int, line: bytes) -> bytes:
    client = await Client.connect(port)
    client.send(line + b"\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(client.reader.read(), PATIENCE_SECONDS)
    client.leave()
    return same(answer)


@pytest.mark.parametrize("data", FIRST_BYTES, ids=repr)
async def test_first_bytes_are_answered_at_once_by_both_or_by_neither(doors: Doors, data: bytes) -> None:
    by_aiohttp, by_fast_path = [await at_once(port, data) for port in doors]

    assert by_fast_path == by_aiohttp
    assert by_aiohttp is None or by_aiohttp.startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01", b"hello", b"\x00", b"get /"], ids=repr)
async def test_what_never_becomes_a_request_is_answered_at_its_first_byte(doors: Doors, data: bytes) -> None:
    answers = [await at_once(port, data[:1]) for port in doors]

    for answer in answers:
        assert answer is not None
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"\r\nServer: brlite\r\n" in answer
        assert b"\r\nX-Content-Type-Options: nosniff\r\n" in answer
        assert b"\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize("line", WHOLE, ids=repr)
async def test_a_first_line_has_the_same_answer_at_both_doors(doors: Doors, line: bytes) -> None:
    by_aiohttp, by_fast_path = [await whole(port, line) for port in doors]

    assert by_fast_path == by_aiohttp


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET http://x/health HTTP/1.1", 200),
        (b"GET http://[::1]:8000/version HTTP/1.1", 200),
        (b"GET HTTPS://X:1/health?a HTTP/1.0", 200),
        (b"GET http://x HTTP/1.1", 404),
        (b"GET http://user@x/health HTTP/1.1", 400),
        (b"GET http:///health HTTP/1.1", 400),
        (b"GET ftp://x/health HTTP/1.1", 400),
        (b"HEAD /v1/models HTTP/1.1", 200),
        (b"HEAD /version HTTP/1.1", 200),
        (b"HEAD /metrics HTTP/1.1", 200),
    ],
    ids=repr,
)
async def test_absolute_targets_and_head_are_taken(doors: Doors, line: bytes, status: int) -> None:
    answers = [await whole(port, line) for port in doors]

    assert [int(answer[9:12]) for answer in answers] == [status] * 2
    if line.startswith(b"HEAD"):
        assert all(answer.endswith(b"\r\n\r\n") for answer in answers)


UPGRADES = [
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",  # Java's HttpClient
    b"Upgrade: h2c\r\n",
    b"Connection: upgrade\r\nUpgrade: TLS/1.2\r\n",
]
VERSION = b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
BODY = b'{"model":"nobody"}'


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize(
    "request_with",
    [
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n%b\r\n",
        POST + b"%%bContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
        POST + b"%%bTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
    ],
    ids=["GET", "POST", "POST in chunks"],
)
@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_request_behind_an_upgrade_is_answered_or_the_connection_closed(
    doors: Doors, upgrade: bytes, request_with: bytes, pieces: int
) -> None:
    for port in doors:
        client = await Client.connect(port)
        client.send(request_with % upgrade + (VERSION if pieces == 1 else b""))
        first = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
        if pieces == 2:
            client.send(VERSION)
        try:
            rest = await asyncio.wait_for(client.reader.read(2**16), PATIENCE_SECONDS)
        except ConnectionError:
            rest = b""
        client.leave()

        assert first.status in (200, 400, 404)
        assert rest == b"" or rest.startswith(b"HTTP/1.1 200 OK\r\n")

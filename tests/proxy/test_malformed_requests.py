"""What is no request: malformed heads, bodies and paths. It is refused, and no upstream sees it."""

from __future__ import annotations

import asyncio

import pytest

from brlite.config.options import LimitsConfig
from tests.limits import PATIENCE_SECONDS
from tests.proxy.conftest import BODY, CHAT, HEAD, HIDDEN, UPGRADE
from tests.proxy.raw_client import post
from tests.proxy.scripts import PLAIN
from tests.rows import all_rows

MALFORMED = {
    "a length and chunks": HEAD
    + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n1c\r\n%b\r\n0\r\n\r\n" % BODY
    + HIDDEN,
    "chunks and a length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "two lengths": HEAD + b"Content-Length: 28\r\nContent-Length: 5\r\n\r\n" + BODY + HIDDEN,
    "the same length twice": HEAD + b"Content-Length: 28\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    **{
        f"length {value!r}": HEAD + b"Content-Length: %b\r\n\r\n" % value + BODY + HIDDEN
        for value in (b"-28", b"+28", b"28, 28", b"28,5", b"0x1c", b"2_8", b"1e1", b"", b"9" * 40, b"2 8", b"\xd9\xa3")
    },
    **{
        f"coding {value!r}": HEAD + b"Transfer-Encoding: %b\r\n\r\n1c\r\n%b\r\n0\r\n\r\n" % (value, BODY) + HIDDEN
        for value in (
            *(b"chunked, identity", b"identity", b"xchunked", b"chunkedx", b"chunked, chunked", b"gzip, chunked"),
            *(b"chunked;a=b", b'"chunked"', b"chunked\x0b", b"\x0bchunked", b",chunked,", b"cow"),
        )
    },
    "two codings": HEAD
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n1c\r\n%b\r\n0\r\n\r\n" % BODY
    + HIDDEN,
    "a coding in HTTP/1.0": HEAD.replace(b"1.1", b"1.0")
    + b"Transfer-Encoding: chunked\r\n\r\n1c\r\n%b\r\n0\r\n\r\n" % BODY
    + HIDDEN,
    **{
        f"chunk size {line!r}": HEAD + b"Transfer-Encoding: chunked\r\n\r\n%b%b\r\n0\r\n\r\n" % (line, BODY) + HIDDEN
        for line in (
            *(b"-1c\r\n", b"+1c\r\n", b"0x1c\r\n", b"1_c\r\n", b" 1c\r\n", b"1c\n", b"\r\n", b"zz\r\n", b"1b\r\n"),
            *(b"1c\r\r\n", b"1c;\0\r\n", b"f" * 17 + b"\r\n", "١\r\n".encode()),
        )
    },
    "a folded header": HEAD + b"X-A: b\r\n c\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a folded length": HEAD + b"Content-Length:\r\n 28\r\n\r\n" + BODY + HIDDEN,
    "a space before the colon": HEAD + b"Content-Length : 28\r\n\r\n" + BODY + HIDDEN,
    "a space before the name": CHAT + b" Host: x\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a header without a colon": HEAD + b"X-A\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a header without a name": HEAD + b": b\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "bare line feeds": HEAD.replace(b"\r\n", b"\n") + b"Content-Length: 28\n\n" + BODY + HIDDEN,
    "one bare line feed": HEAD + b"X-A: b\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a bare carriage return": HEAD + b"X-A: b\rContent-Length: 5\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "NUL in a value": HEAD + b"X-A: \0\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "NUL in a name": HEAD + b"X-\0: b\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a control character in a value": HEAD + b"X-A: \x01\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "DEL in a name": HEAD + b"X\x7f: b\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "no Host": CHAT + b"Content-Type: application/json\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "two Hosts": HEAD + b"Host: y\r\nContent-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "NUL in the path": HEAD.replace(b"chat", b"ch\0at") + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a space in the path": HEAD.replace(b"chat", b"ch at") + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a control character in the path": HEAD.replace(b"chat", b"ch\x01at")
    + b"Content-Length: 28\r\n\r\n"
    + BODY
    + HIDDEN,
    "a tab": HEAD.replace(b"POST ", b"POST\t") + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "HTTP/1.2": HEAD.replace(b"1.1", b"1.2") + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "HTTP/2.0": HEAD.replace(b"1.1", b"2.0") + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a version of two digits": HEAD.replace(b"1.1", b"1.11") + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "HTTP/0.9": b"GET /v1/models\r\n\r\n" + HIDDEN,
    "an HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "a method that nobody knows": HEAD.replace(b"POST", b"PO(ST") + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "CONNECT": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: 127.0.0.1:1\r\nConnection: close\r\n\r\n",
    "a target with an authority only": HEAD.replace(b"/v1/chat/completions", b"127.0.0.1:1")
    + b"Content-Length: 28\r\n\r\n"
    + BODY,
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "POST *": HEAD.replace(b"/v1/chat/completions", b"*") + b"Content-Length: 28\r\n\r\n" + BODY,
    "a header of 64 KB": HEAD + b"X-A: %b\r\nContent-Length: 28\r\n\r\n" % (b"a" * 65_536) + BODY + HIDDEN,
    "a header of 4 MB": HEAD + b"X-A: %b\r\nContent-Length: 28\r\n\r\n" % (b"a" * 4_194_304) + BODY + HIDDEN,
    "a header that never ends": HEAD + b"X-A: " + b"a" * 200_000,
    "20,000 headers": HEAD + b"X-A: b\r\n" * 20_000 + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "200 headers": HEAD + b"X-A: b\r\n" * 200 + b"Content-Length: 28\r\n\r\n" + BODY + HIDDEN,
    "a path of 2 MB": HEAD.replace(b"chat", b"a" * 2**21) + b"Content-Length: 28\r\n\r\n" + BODY,
    "no JSON": post(b"{", b"Connection: close"),
    "JSON, but no object": post(b"[]", b"Connection: close"),
    "two models": post(b'{"model":"m","model":"other"}', b"Connection: close"),
    "no model that is known": post({"model": "other"}, b"Connection: close"),
    "a Content-Encoding": post(BODY, b"Content-Encoding: gzip", b"Connection: close"),
    "another Content-Type": post(BODY, b"Connection: close").replace(b"application/json", b"text/plain"),
    **{
        f"the path {path!r}": post(BODY, b"Connection: close", path=path)
        for path in (
            *(b"/v1/../admin", b"/v1/..", b"/v1/./../admin", b"/v1/%2e%2e/admin", b"/v1/.%2E/admin", b"/v1/..%2fadmin"),
            *(b"/v1/chat/..\\..\\admin", b"/v2/chat", b"/admin", b"/v1", b"//v1/../chat"),
            *(b"/v1/a%2f..%2f..%2fadmin", b"/v1/a%5C%2E%2e%5Cadmin", b"/v1/..;/admin", b"/v1/..%3Ba/admin"),
            *(b"/any/v1/chat/completions", b"/metrics/v1/chat", b"//v1/chat", b"/any/tokenize"),
            *(b"/v1/load_lora_adapter", b"/v1/completions;a", b"/v1/completions%20"),
        )
    },
}


@pytest.mark.parametrize("way", ["fast_path", "aiohttp"])
async def test_what_is_no_request_is_refused_and_no_upstream_sees_it(serve, way) -> None:
    served = await serve(limits=LimitsConfig(header_seconds=2, body_seconds=2))

    async def ask(name: str, data: bytes) -> None:
        if way == "aiohttp":
            data = data.replace(b"\r\n", b"\r\n" + UPGRADE, 1) if b"Connection: close" not in data else data
        client = await served.connect()

        client.send(data)
        with row(name):
            answer = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)

            assert 400 <= answer.status < 500 or answer.status in (501, 505)
            assert isinstance(answer.error["message"], str)
            assert await asyncio.wait_for(client.is_closed(), PATIENCE_SECONDS)

    with all_rows() as row:
        await asyncio.gather(*(ask(name, data) for name, data in MALFORMED.items()))
        with row("the upstream"):
            assert served.upstream.num_connections == 0


@pytest.mark.parametrize("way", ["fast_path", "aiohttp"])
@pytest.mark.parametrize(
    "path",
    [
        *(b"/v1/completions?x=%0d%0aX-Evil:%20yes", b"/v1/completions?%20HTTP/1.1%0d%0aX-Evil:b", b"/tokenize?%00"),
        *(
            b"/v1/completions?b=../c",
            b"/v1/completions?b;c=%E6%B0%B4",
            b'/v1/completions?"b<c>',
            b"/v1/completions??//b",
        ),
    ],
)
async def test_odd_queries_reach_the_upstream_as_they_were_sent(serve, path, way) -> None:
    served = await serve()

    answer = await served.ask(post(BODY, *(UPGRADE.split(b"\r\n")[:2] if way == "aiohttp" else ()), path=path))

    assert answer.body == PLAIN
    assert [request.path for request in served.upstream.requests] == [
        path.partition(b"#")[0] if way == "aiohttp" else path
    ]


@pytest.mark.parametrize("path", [b"/v1/\xff", b"/v1/completions?\xff\xfe", "/v1/水".encode()])
async def test_bytes_that_no_path_has_are_refused(serve, path) -> None:
    served = await serve()

    answer = await served.ask(post(BODY, path=path))

    assert 400 <= answer.status < 500
    assert served.upstream.num_connections == 0

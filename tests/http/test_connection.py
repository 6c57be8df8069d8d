"""Clients that are slow, greedy or malformed, over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import pytest
from aiohttp import web

from brlite.http import connection
from brlite.http.connection import MAX_SLASHES
from brlite.http.connections import MAX_SPARE, share_of
from tests.http.conftest import RawClient
from tests.limits import PATIENCE_SECONDS

GET = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
GET_AND_CLOSE = b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def status(answer: bytes) -> int:
    return int(answer[9:12])


def error_of(answer: bytes) -> dict[str, object]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


async def test_headers_that_stay_unfinished_get_408(http_server, connect, hello) -> None:
    for seconds in (0.2, 2.0, 20.0):  # on a busy machine it may be over before the first byte is there
        client = await connect(await http_server({"GET /hello": hello}, header_seconds=seconds))
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        if answer := await client.rest():
            break

    assert status(answer) == 408
    assert error_of(answer)["code"] == "request_timeout"


async def test_dripping_headers_do_not_extend_the_deadline(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello}, header_seconds=0.3)
    client = await connect(server)

    async def drip() -> None:
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n")
        while True:
            await asyncio.sleep(0.02)
            client.send(b"X: y\r\n")

    dripping = asyncio.create_task(drip())
    answer = await client.rest()
    dripping.cancel()

    assert answer[9:12] in (b"408", b"")  # a drip that comes too late resets the connection: the answer may be lost


async def test_a_silent_connection_is_closed_without_a_word(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello}, header_seconds=0.2)
    client = await connect(server)

    assert await client.rest() == b""


async def test_an_idle_keep_alive_connection_is_closed(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello}, keepalive_seconds=1.0)
    client = await connect(server)

    client.send(GET)
    head, body = await client.answer()
    rest = await client.rest()

    assert (status(head), body, rest) == (200, b"hello", b"")


async def test_the_deadline_holds_for_the_second_request_too(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello}, header_seconds=1.0)
    client = await connect(server)

    client.send(GET)
    await client.answer()
    client.send(b"GET /hel")

    assert status(await client.rest()) == 408


async def test_a_handler_may_take_longer_than_the_header_deadline(http_server, connect) -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(1.2)
        return web.Response(text="slow")

    server = await http_server({"GET /hello": slow}, header_seconds=1.0)
    client = await connect(server)

    client.send(GET + GET_AND_CLOSE)  # pipelined: the second one's headers are there before the first one's answer
    answer = await client.rest()

    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.endswith(b"slow")


class Doors:
    """A handler whose answers wait for `open`."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.num_waiting = 0

    async def wait(self, request: web.Request) -> web.Response:
        self.num_waiting += 1
        await self.open.wait()
        return web.Response(text="slow")


async def test_connections_above_the_limit_get_503_while_all_are_busy_and_a_closed_one_makes_room(
    http_server, connect, eventually, caplog
) -> None:
    doors = Doors()
    server = await http_server({"GET /hello": doors.wait}, max_connections=2)
    clients = [await connect(server), await connect(server)]
    for client in clients:
        client.send(GET_AND_CLOSE)
    await eventually(lambda: doors.num_waiting == 2)

    asking, silent = await connect(server), await connect(server)
    asking.send(GET)
    refused = [await asking.rest(), await silent.rest()]
    doors.open.set()
    for client in clients:
        assert status(await client.rest()) == 200
    welcome = await connect(server)
    welcome.send(GET_AND_CLOSE)

    assert [status(answer) for answer in refused] == [503, 503]
    assert all(b"Retry-After: 1" in answer for answer in refused)
    assert b"Connection: close" in refused[0]
    assert status(await welcome.rest()) == 200
    assert "max_connections (2) reached" in caplog.text
    assert "2 connections were refused" in caplog.text


async def test_a_limit_that_each_request_reaches_is_logged_once(http_server, connect, eventually, caplog) -> None:
    doors = Doors()
    server = await http_server({"GET /hello": doors.wait}, max_connections=1)

    for number in range(1, 6):
        doors.open.clear()
        busy = await connect(server)
        busy.send(GET_AND_CLOSE)
        await eventually(lambda number=number: doors.num_waiting == number)
        refused = await connect(server)
        refused.send(GET)
        assert status(await refused.rest()) == 503
        doors.open.set()
        assert status(await busy.rest()) == 200
        await eventually(lambda: server.num_connections == 0)

    lines = [record.message.partition(":")[0] for record in caplog.records if record.name.endswith("connections")]
    assert lines == ["max_connections (1) reached", "there is room again"]


async def test_what_probes_ask_is_answered_beyond_the_limit(http_server, connect, hello, eventually) -> None:
    doors = Doors()
    server = await http_server({"GET /hello": doors.wait, "GET /health": hello}, max_connections=1)
    busy = await connect(server)
    busy.send(GET_AND_CLOSE)
    await eventually(lambda: doors.num_waiting == 1)
    crowd = [await connect(server) for _ in range(2 * MAX_SPARE)]  # they ask for nothing, and keep nobody out
    probe = await connect(server)

    probe.send(b"GET /health?x HTTP/1.1\r\nHost: h\r\n\r\n")
    answer = await probe.rest()
    doors.open.set()

    assert status(answer) == 200
    assert b"Connection: close" in answer  # it stays beyond the limit
    assert status(await crowd[0].rest()) == 503
    assert status(await busy.rest()) == 200


@pytest.mark.parametrize("first_words", [b"", b"GET /hel", GET], ids=["silent", "half a head", "idle"])
async def test_a_connection_that_waits_makes_room_for_a_new_one(http_server, connect, hello, first_words) -> None:
    server = await http_server({"GET /hello": hello}, max_connections=3)
    clients = [await connect(server) for _ in range(3)]
    for client in clients:
        client.send(first_words)
        if first_words == GET:
            await client.answer()

    for _ in range(3):
        new = await connect(server)
        new.send(GET)
        assert status((await new.answer())[0]) == 200

    assert [await client.rest() for client in clients] == [b""] * 3
    assert server.num_connections == 3


async def test_one_that_has_asked_for_nothing_makes_room_before_one_that_was_served(
    http_server, connect, hello
) -> None:
    server = await http_server({"GET /hello": hello}, max_connections=3)
    served, silent, half = [await connect(server) for _ in range(3)]
    served.send(GET)
    await served.answer()
    half.send(b"GET /hello HTTP/1.1\r\n")

    await connect(server)
    await connect(server)
    served.send(GET)
    head, _ = await served.answer()

    assert (await silent.rest(), await half.rest()) == (b"", b"")
    assert status(head) == 200


async def test_a_request_in_progress_makes_no_room(http_server, connect, hello, eventually) -> None:
    doors = Doors()
    server = await http_server({"GET /hello": doors.wait, "GET /other": hello}, max_connections=2)
    busy, idle = await connect(server), await connect(server)
    busy.send(GET_AND_CLOSE)
    await eventually(lambda: doors.num_waiting == 1)

    for _ in range(5):
        await connect(server)
    doors.open.set()

    assert status(await busy.rest()) == 200
    assert await idle.rest() == b""


async def test_an_address_has_its_share_and_makes_room_among_its_own(http_server, connect, hello, caplog) -> None:
    server = await http_server({"GET /hello": hello}, max_connections=10, max_connections_per_address=2)
    first, second = await connect(server), await connect(server)
    neighbour = RawClient(
        *await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0), limit=2**24)
    )

    third = await connect(server)
    third.send(GET)
    head, _ = await third.answer()
    neighbour.send(GET_AND_CLOSE)
    second.send(GET_AND_CLOSE)

    assert status(head) == 200
    assert await first.rest() == b""
    assert status(await neighbour.rest()) == 200
    neighbour.writer.close()
    assert status(await second.rest()) == 200
    assert "max_connections_per_address (2) reached" in caplog.text


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "local"),
    ],
)
def test_an_address_counts_for_what_one_client_has(peer: str, expected: str) -> None:
    assert share_of(peer) == expected


async def test_a_client_that_reads_nothing_is_cut_off(http_server) -> None:
    ended = asyncio.Event()

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 2**20)
        finally:
            ended.set()

    server = await http_server({"GET /hello": flood}, slow_client_seconds=0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(GET)
        await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)

    assert ended.is_set()


async def test_a_client_that_does_not_read_its_plain_answer_is_cut_off(http_server, eventually) -> None:
    async def big(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * 2**25)

    server = await http_server({"GET /hello": big}, slow_client_seconds=0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(GET_AND_CLOSE)
        await eventually(lambda: server.num_connections == 1)
        await eventually(lambda: server.num_connections == 0)
        received = client.recv(2**26, socket.MSG_WAITALL)

    assert 0 < len(received) < 2**25


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        pytest.param(b"X-Big: " + b"x" * 17_000, 431, id="long field"),
        pytest.param(b"X-Big: " + b"x" * 4 * 2**20, 431, id="4 MB field"),
        pytest.param(b"x" * 17_000 + b": y", 431, id="long name"),
        pytest.param(b"\r\n".join(b"X-%d: y" % number for number in range(20_000)), 431, id="20k fields"),
        pytest.param(b"\r\n".join(b"X-%d: y" % number for number in range(99)), 431, id="101 fields"),
        pytest.param(b"\r\n".join(b"X-%d: " % number + b"y" * 1000 for number in range(20)), 431, id="20 kB in all"),
    ],
)
async def test_header_bombs_are_refused(head: bytes, expected: int, http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello})
    client = await connect(server)

    client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n\r\n")
    answer = await client.rest()

    assert status(answer) == expected
    assert b"at most 16384 bytes (limits.max_header_bytes) and 100 header lines" in answer


@pytest.mark.parametrize(("max_header_bytes", "expected"), [(15_000, 431), (30_000, 200)])
async def test_one_field_may_be_as_long_as_all_may_be_together(
    max_header_bytes: int, expected: int, http_server, connect, hello
) -> None:
    server = await http_server({"GET /hello": hello}, max_header_bytes=max_header_bytes)
    client = await connect(server)

    client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Big: " + b"x" * 20_000 + b"\r\n\r\n")

    assert status(await client.until(b"\r\n")) == expected


async def test_a_two_megabyte_path_is_refused(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello})
    client = await connect(server)

    client.send(b"GET /" + b"a" * 2 * 2**20 + b" HTTP/1.1\r\nHost: x\r\n\r\n")

    assert status(await client.until(b"\r\n")) == 431


async def test_a_refusal_of_a_head_arrives_although_a_long_body_follows(http_server, hello, monkeypatch) -> None:
    monkeypatch.setattr(connection, "LINGERING_SECONDS", PATIENCE_SECONDS)
    server = await http_server({"POST /hello": hello})
    head = b"POST /hello HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 101 + b"Content-Length: 8388608\r\n\r\n"

    def send_all_and_read() -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS) as client:
            client.sendall(head + b"x" * 8_388_608)
            return client.recv(4096)

    answer = await asyncio.to_thread(send_all_and_read)

    assert status(answer) == 431


async def test_a_refused_client_that_has_left_is_no_error(http_server, hello, eventually, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, "brlite")
    server = await http_server({"GET /hello": hello})

    with socket.create_connection(("127.0.0.1", server.port)) as client:
        # It closes while the answer is made, with no turn of the loop between that and the answer.
        monkeypatch.setattr(connection, "new_request_id", lambda: client.close() or "id")
        client.sendall(b"garbage\r\n\r\n")
        await eventually(lambda: client.fileno() < 0 and server.num_connections == 0)

    assert [record.levelname for record in caplog.records] == ["INFO"]


MALFORMED = [
    pytest.param(b"GET /hello?key=SECRET HTTP/1.1 SECRET\r\nAuthorization: Bearer SECRET\r\n\r\n", id="request line"),
    pytest.param(b"GET /hello HTTP/1.1\r\nAuthorization: Bearer SECRET\r\n\r\n", id="no host"),
    pytest.param(b"GET /hello HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer SECRET\r\nbad header\r\n\r\n", id="header"),
    pytest.param(b"SECRET\r\n\r\n", id="no method"),
    pytest.param(b"\x16\x03\x01SECRET\r\n\r\n", id="TLS"),
    pytest.param(b"GET SECRET HTTP/1.1\r\nHost: x\r\n\r\n", id="relative path"),
    pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nSECRET", id="HTTP/2"),
    pytest.param(b"GET /hello HTTP/1.1\r\nHost: x\r\nX: " + b"SECRET" * 3000 + b"\r\n\r\n", id="long field"),
    pytest.param(b"GET /hello HTTP/1.1\r\nHost: x\r\nHost: y\r\nX: SECRET\r\n\r\n", id="two hosts"),
    pytest.param(b"GET /hello HTTP/1.1\r\nHost: x\r\nX: SECRET\0\r\n\r\n", id="null byte"),
]


@pytest.mark.parametrize("request_bytes", MALFORMED)
async def test_a_malformed_request_is_answered_and_logged_without_its_content(
    request_bytes, http_server, connect, hello, caplog
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await http_server({"GET /hello": hello})
    client = await connect(server)

    client.send(request_bytes)
    answer = await client.rest()

    assert status(answer) in (400, 431)
    assert error_of(answer)["type"] == "invalid_request_error"
    assert b"X-Request-Id: " in answer
    lines = [record for record in caplog.records if record.name.startswith(("brlite", "aiohttp"))]
    assert [record.levelname for record in lines] == ["INFO"]
    assert lines[0].getMessage().startswith("malformed request from 127.0.0.1: ")
    assert "SECRET" not in caplog.text + answer.decode()
    assert "Traceback" not in caplog.text


SMUGGLED = b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
SMUGGLING = [
    pytest.param(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", id="CL+TE"),
    pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", id="TE+CL"),
    pytest.param(b"Content-Length: 0\r\nContent-Length: 5\r\n", id="two lengths"),
    pytest.param(b"Content-Length: 5\r\nContent-Length: 5\r\n", id="two equal lengths"),
    pytest.param(b"Content-Length: 0, 5\r\n", id="length list"),
    pytest.param(b"Content-Length: +5\r\n", id="plus length"),
    pytest.param(b"Content-Length: -5\r\n", id="negative length"),
    pytest.param(b"Content-Length: 0x5\r\n", id="hex length"),
    pytest.param(b"Content-Length: 1_0\r\n", id="underscore length"),
    pytest.param(b"Content-Length: 99999999999999999999999\r\n", id="huge length"),
    pytest.param(b"Content-Length : 5\r\n", id="space before colon"),
    pytest.param(b"Transfer-Encoding: identity\r\n", id="TE identity"),
    pytest.param(b"Transfer-Encoding: xchunked\r\n", id="TE xchunked"),
    pytest.param(b"Transfer-Encoding: chunked, identity\r\n", id="TE not last"),
    pytest.param(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", id="two TE"),
    pytest.param(b"Transfer-Encoding:\x0bchunked\r\n", id="TE vertical tab"),
    pytest.param(b"Transfer-Encoding: \r\n chunked\r\nContent-Length: 5\r\n", id="obs-fold TE"),
    pytest.param(b"X: y\r\n Content-Length: 5\r\n", id="obs-fold"),
    pytest.param(b"X: y\rContent-Length: 5\r\n", id="bare CR"),
    pytest.param(b"X: y\nContent-Length: 5\r\n", id="bare LF"),
]


@pytest.mark.parametrize("headers", SMUGGLING)
async def test_ambiguous_framing_is_refused_and_nothing_behind_it_is_answered(headers, http_server, connect) -> None:
    served = []

    async def count(request: web.Request) -> web.Response:
        served.append(request.path)
        return web.Response(text="hello")

    server = await http_server({"GET /hello": count, "POST /hello": count})
    client = await connect(server)

    client.send(b"POST /hello HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n0\r\n\r\n" + SMUGGLED)
    answer = await client.rest()

    assert status(answer) == 400
    assert answer.count(b"X-Request-Id: ") == 1
    assert served == []


async def test_a_refused_expect_header_is_answered_in_the_envelope(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello})
    client = await connect(server)

    client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nExpect: miracles\r\nConnection: close\r\n\r\n")
    answer = await client.rest()

    assert status(answer) == 417
    assert error_of(answer)["type"] == "invalid_request_error"


async def test_connect_and_upgrade_are_ordinary_requests(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello})
    tunnel, upgrade = await connect(server), await connect(server)

    tunnel.send(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    upgrade.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n" + GET)

    assert status(await tunnel.rest()) in (400, 404, 405)
    assert status(await upgrade.until(b"\r\n")) == 200


async def test_many_slow_connections_harm_nobody(http_server, connect, hello) -> None:
    server = await http_server({"GET /hello": hello})
    for _ in range(200):
        (await connect(server)).send(b"GET /hello HTTP/1.1\r\nX: ")

    client = await connect(server)
    client.send(GET_AND_CLOSE)

    assert status(await client.rest()) == 200


@pytest.mark.parametrize(("num_slashes", "expected"), [(MAX_SLASHES, 200), (MAX_SLASHES + 1, 404)])
async def test_a_path_of_many_slashes_is_not_looked_up(http_server, connect, hello, num_slashes, expected) -> None:
    server = await http_server({"GET /{path:.*}": hello})
    client = await connect(server)

    client.send(b"GET %b?/x HTTP/1.1\r\nHost: x\r\n\r\n" % (b"/" * num_slashes))
    head, _ = await client.answer()

    assert status(head) == expected

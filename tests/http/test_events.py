"""Event streams over real sockets, with aiohttp's client, http.client and raw bytes."""

from __future__ import annotations

import asyncio
import http.client
import json

import aiohttp
import msgspec
import pytest
from aiohttp import web

from brlite.dialects.sse import DONE_EVENT, frame
from brlite.http.events import BACKLOG_BYTES, EventStream, WriteTurn
from tests.limits import PATIENCE_SECONDS


async def count_to_three(request: web.Request) -> web.StreamResponse:
    async with EventStream(request, comment_seconds=60) as events:
        events.write(frame(b"1"))
        await asyncio.sleep(0)
        events.write(frame(b"2") + frame(b"3"))
        return await events.finish(DONE_EVENT)


EVENTS = b"data: 1\n\ndata: 2\n\ndata: 3\n\ndata: [DONE]\n\n"


async def test_events_arrive_and_the_connection_takes_its_next_request(http_server) -> None:
    server = await http_server({"GET /x": count_to_three})
    connector = aiohttp.TCPConnector(limit=1)

    async with aiohttp.ClientSession(connector=connector) as session:
        texts = []
        for _ in range(3):
            async with session.get(server.url + "/x") as response:
                texts.append(await response.read())
        num_connections = server.num_connections

    assert texts == [EVENTS] * 3
    assert num_connections == 1
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"


async def test_http_client_of_the_standard_library_agrees(http_server) -> None:
    server = await http_server({"GET /x": count_to_three})

    def ask_twice() -> list[bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_SECONDS)
        texts = []
        for _ in range(2):
            connection.request("GET", "/x")
            texts.append(connection.getresponse().read())
        connection.close()
        return texts

    assert await asyncio.to_thread(ask_twice) == [EVENTS] * 2


@pytest.mark.parametrize("wish", [b"", b"Connection: keep-alive\r\n"])
async def test_http_1_0_gets_plain_bytes_and_a_close(wish: bytes, http_server, connect) -> None:
    client = await connect(await http_server({"GET /x": count_to_three}))

    client.send(b"GET /x HTTP/1.0\r\n" + wish + b"\r\n")
    head, _, body = (await client.rest()).partition(b"\r\n\r\n")

    assert b"chunked" not in head
    assert body == EVENTS


async def test_one_send_is_one_chunk(http_server, connect) -> None:
    client = await connect(await http_server({"GET /x": count_to_three}))

    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    _, _, body = (await client.rest()).partition(b"\r\n\r\n")

    assert body == (b"9\r\ndata: 1\n\n\r\n12\r\ndata: 2\n\ndata: 3\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def test_no_events_are_no_chunk_since_an_empty_chunk_ends_a_response(http_server, connect) -> None:
    async def pausing(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=60) as events:
            assert events.write(b"")
            await asyncio.sleep(0)
            events.write(frame(b"1"))
            assert events.write(b"")
            return await events.finish()

    client = await connect(await http_server({"GET /x": pausing}))
    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    _, _, body = (await client.rest()).partition(b"\r\n\r\n")

    assert body == b"9\r\ndata: 1\n\n\r\n0\r\n\r\n"


async def test_silence_is_filled_with_comments_until_the_end(http_server, connect) -> None:
    go_on = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=0.05) as events:
            await go_on.wait()
            events.write(frame(b"1"))
            return await events.finish(DONE_EVENT)

    client = await connect(await http_server({"GET /x": silent}))
    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
    for _ in range(2):
        await client.until(b": keep-alive\n\n")
    go_on.set()
    end = await client.until(b"0\r\n\r\n")

    assert end.endswith(b"9\r\ndata: 1\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def test_comments_can_tell_what_goes_on_for_a_while(http_server, connect) -> None:
    go_on = asyncio.Event()

    async def busy(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=0.05) as events:
            with events.commenting(lambda: "halfway", seconds=0.01):
                await go_on.wait()
            go_on.clear()
            await go_on.wait()
            return await events.finish(DONE_EVENT)

    client = await connect(await http_server({"GET /x": busy}))
    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
    for _ in range(3):
        told = await client.until(b"\n\n\r\n")
        assert told.endswith(b": halfway\n\n\r\n")
    go_on.set()
    await client.until(b": keep-alive\n\n")
    go_on.set()

    assert (await client.until(b"0\r\n\r\n")).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_after_the_client_left_sends_do_nothing_and_say_so(http_server, connect, caplog) -> None:
    sent: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()

    async def stream(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=60) as events:
            events.write(frame(b"1"))
            try:
                await asyncio.Event().wait()
            finally:
                sent.set_result([events.write(frame(b"2")), events.comment(), await events.drained(1)])
        raise AssertionError

    client = await connect(await http_server({"GET /x": stream}))
    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
    await client.until(b"data: 1\n\n")
    client.writer.close()

    assert await asyncio.wait_for(sent, PATIENCE_SECONDS) == [False, False, False]
    assert caplog.records == []


async def test_a_client_that_lags_is_seen_and_waited_for(http_server, connect) -> None:
    block = b"x" * 2**20
    waited: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def stream(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=60) as events:
            num_blocks = 0
            while not events.is_backlogged:
                events.write(frame(block))
                num_blocks += 1
            waited.set_result(await events.drained(10))
            events.write(frame(b"%d" % num_blocks))
            return await events.finish(DONE_EVENT)

    client = await connect(await http_server({"GET /x": stream}))
    client.send(b"GET /x HTTP/1.0\r\n\r\n")
    _, _, body = (await client.rest()).partition(b"\r\n\r\n")

    assert waited.result()
    num_blocks = body.count(block)
    assert body.endswith(b"data: %d\n\ndata: [DONE]\n\n" % num_blocks)


async def test_a_client_that_never_catches_up_is_cut(http_server, connect) -> None:
    is_cut = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=60) as events:
            try:
                while await events.drained(0.1):
                    events.write(frame(b"x" * BACKLOG_BYTES))
            finally:
                is_cut.set()
        raise ConnectionResetError

    client = await connect(await http_server({"GET /x": stream}))
    client.writer.transport.pause_reading()
    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")

    await asyncio.wait_for(is_cut.wait(), PATIENCE_SECONDS)


@pytest.mark.parametrize("num_clients", [20])
async def test_streams_side_by_side_do_not_mix(num_clients: int, http_server, connect) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=60) as events:
            for _ in range(20):
                events.write(frame(request.query_string.encode()))
                await asyncio.sleep(0)
            return await events.finish(DONE_EVENT)

    server = await http_server({"GET /x": stream})
    clients = [await connect(server) for _ in range(num_clients)]
    for number, client in enumerate(clients):
        client.send(f"GET /x?{number} HTTP/1.0\r\n\r\n".encode())
    bodies = [(await client.rest()).partition(b"\r\n\r\n")[2] for client in clients]

    assert bodies == [b"data: %d\n\n" % number * 20 + b"data: [DONE]\n\n" for number in range(num_clients)]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
async def test_an_event_is_one_line_in_every_readers_eyes(character: str, http_server) -> None:
    text = f"水{character}🦜"

    async def stream(request: web.Request) -> web.StreamResponse:
        async with EventStream(request, comment_seconds=10) as events:
            events.write(b"".join(frame(msgspec.json.encode({"text": each})) for each in (text, "plain")))
            return await events.finish(DONE_EVENT)

    server = await http_server({"GET /x": stream})
    async with aiohttp.ClientSession() as session, session.get(server.url + "/x") as response:
        lines = (await response.text()).splitlines()

    assert [json.loads(line[6:]) for line in lines[:3] if line] == [{"text": text}, {"text": "plain"}]
    assert lines[4] == "data: [DONE]"


def test_a_stream_that_fails_does_not_hold_up_the_other_streams() -> None:
    turn, calls = WriteTurn(), list[str]()

    class Stream:
        def __init__(self, name: str, error: Exception | None = None) -> None:
            self.name, self.error = name, error

        def flush(self) -> None:
            if self.error is not None:
                raise self.error
            calls.append(f"{self.name} flushed")

        def abort(self) -> None:
            calls.append(f"{self.name} aborted")

    turn.streams += [Stream("first", RuntimeError("its handle is closed")), Stream("second")]  # type: ignore[list-item]
    turn.flush()

    assert calls == ["first aborted", "second flushed"]
    assert turn.streams == []

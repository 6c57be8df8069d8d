"""Clients of the proxy that send in pieces, are slow or leave: answered or dropped, and the upstream never harmed."""

from __future__ import annotations

import asyncio
import socket

import pytest

from brlite.config.options import LimitsConfig, ProxyConfig, UpstreamConfig
from brlite.proxy.attempt import FULL_READ_BYTES, Attempt
from brlite.proxy.fast_path import TURN_BYTES, ArrivingRequest
from tests.limits import PATIENCE_SECONDS
from tests.proxy.conftest import BODY, HEAD, Served
from tests.proxy.proxies import run_proxy, wait_until
from tests.proxy.raw_client import Client, post
from tests.proxy.scripted import Call, Then
from tests.proxy.scripts import DONE, EVENTS, GOOD_PLAIN, JSON_HEAD, PLAIN, TOKENS, chunks, event, length, sse

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
PLAIN_BODY = {"model": "m"}
STREAM_BODY = {"model": "m", "stream": True}


# Requests in pieces, behind each other, and half of them


def one_of_each() -> list[tuple[bytes, bytes]]:
    """Requests, and how their answers begin: the proxy's own and aiohttp's, with and without bodies."""
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + chunks(BODY[:9], BODY[9:])
    return [
        (post(PLAIN_BODY), PLAIN),
        (HEALTH, b'{"status"'),
        (post(STREAM_BODY), EVENTS),
        (post({"model": "unknown"}), b'{"error"'),
        (HEAD + chunked, PLAIN),
        (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", b'{"error"'),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(BODY, end=b"0\r\nX-T: 1\r\n\r\n"), PLAIN),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", b'{"object":"list"'),
        (post(b"{"), b'{"error"'),
        (post(STREAM_BODY), EVENTS),
    ]


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 10**6])
async def test_pipelined_requests_are_answered_in_order_however_they_come(serve, size) -> None:
    served = await serve()
    requests = one_of_each()
    data = b"".join(request for request, _ in requests)
    client = await served.connect()

    async def write() -> None:
        for at in range(0, len(data), size):
            client.send(data[at : at + size])
            await asyncio.sleep(0)

    writing = asyncio.create_task(write())
    answers = [await asyncio.wait_for(client.answer(), PATIENCE_SECONDS) for _ in requests]
    await writing

    assert [answer.body[: len(begin)] for answer, (_, begin) in zip(answers, requests, strict=True)] == [
        begin for _, begin in requests
    ]


@pytest.mark.parametrize("first", range(len(one_of_each())))
async def test_any_two_requests_follow_each_other_on_one_connection(serve, first) -> None:
    served = await serve()
    requests = one_of_each()

    for second in requests:
        client = await served.connect()
        for request, begin in (requests[first], second, requests[first]):
            client.send(request)
            assert (await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)).body.startswith(begin)


@pytest.mark.parametrize("body", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health HTTP/1.1"])
async def test_garbage_behind_a_request_does_not_harm_its_answer(serve, body) -> None:
    served = await serve()
    client = await served.connect()

    client.send(post(PLAIN_BODY) + b"\0\1garbage\r\n\r\n" + body)
    answers = [await client.answer(), await client.answer()]

    assert [answer.status for answer in answers] == [200, 400]
    assert await client.is_closed()


async def test_expect_100_continue_is_answered_before_the_body_is_sent(serve) -> None:
    served = await serve()
    client = await served.connect()
    data = post(PLAIN_BODY, b"Expect: 100-continue")
    head, _, body = data.partition(b"\r\n\r\n")

    client.send(head + b"\r\n\r\n")
    interim = await client.reader.readuntil(b"\r\n\r\n")
    client.send(body)
    answer = await client.answer()

    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.body == PLAIN


@pytest.mark.parametrize("form", ["length", "chunks", "small chunks"])
async def test_a_body_may_be_as_long_as_allowed_and_no_longer(serve, form) -> None:
    limit = 5000
    served = await serve(limits=LimitsConfig(max_body_bytes=limit))
    answers = []

    for num_bytes in (limit, limit + 1):
        body = b'{"model":"m","x":"%b"}' % (b"x" * (num_bytes - 20))
        if form == "length":
            data = post(body)
        else:
            size = 1 if form == "small chunks" else 999
            parts = (body[at : at + size] for at in range(0, len(body), size))
            data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(*parts)
        answers.append(await served.ask(data))

    assert [answer.status for answer in answers] == [200, 413]
    assert len(served.upstream.requests) == 1


async def test_a_body_in_tiny_chunks_is_read_in_many_turns_of_the_loop(serve, monkeypatch) -> None:
    sizes = []

    def feed(arriving: ArrivingRequest, data: bytes, max_bytes: int) -> bool:
        sizes.append(len(data))
        return read(arriving, data, max_bytes)

    read = ArrivingRequest.feed
    monkeypatch.setattr(ArrivingRequest, "feed", feed)
    served = await serve()
    body = b'{"model":"m","x":"%b"}' % (b"x" * 50_000)

    answer = await served.ask(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(*map(bytes, zip(body))))

    assert (answer.status, answer.body) == (200, PLAIN)
    assert served.upstream.requests[0].body["x"] == "x" * 50_000
    assert max(sizes) <= TURN_BYTES < sum(sizes)


async def test_an_upstream_that_sends_much_at_once_leaves_others_their_turns(serve, monkeypatch) -> None:
    async def act(call: Call) -> Then:
        await call.send(sse(chunks(*[TOKENS[0]] * 10_000, *TOKENS, DONE)))
        return "keep"

    is_reading = []

    def take(attempt: Attempt, data: bytes) -> None:
        connection = attempt._connection
        read(attempt, data)
        if len(data) >= FULL_READ_BYTES and attempt.is_connected:
            is_reading.append(connection.transport.is_reading())

    read = Attempt.data_received
    monkeypatch.setattr(Attempt, "data_received", take)
    served = await serve(act)

    answer = await served.ask(post(STREAM_BODY))

    assert answer.body.count(TOKENS[0]) == 10_001
    assert is_reading
    assert not any(is_reading)


async def test_chunk_extensions_take_no_memory(serve) -> None:
    served = await serve(limits=LimitsConfig(max_body_bytes=20_000, body_seconds=5))
    client = await served.connect()

    client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    held = []
    for _ in range(100):
        client.send(b"1;%b\r\nx\r\n" % (b"e" * 10_000))
        await asyncio.sleep(0.001)
        held.append(served.proxy.bodies.num_bytes)

    assert 0 < max(held) <= 2 * 20_000 + 2**18 + 2**16


def _lanes_of(served: Served) -> list[object]:
    return [connection._fast_path for connection in served.proxy.server._connections._members]


async def test_slow_headers_and_slow_bodies_get_408(serve) -> None:
    served = await serve(limits=LimitsConfig(header_seconds=2, body_seconds=2))

    answers = await asyncio.gather(
        served.ask(HEAD),
        served.ask(HEAD + b"Content-Length: 28\r\n\r\n" + BODY[:5]),
        served.ask(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1c\r\n" + BODY[:5]),
    )

    assert [answer.status for answer in answers] == [408] * 3
    assert served.upstream.num_connections == 0


async def test_a_client_that_has_said_all_and_closes_its_side_is_not_left_hanging(serve) -> None:
    served = await serve()
    client = await served.connect()

    client.send(post(PLAIN_BODY))
    client.writer.write_eof()

    assert await asyncio.wait_for(client.is_closed_after(PLAIN), PATIENCE_SECONDS)


# Clients that leave


async def never(call: Call) -> Then:
    await call.wait_left()
    return "close"


async def half(call: Call) -> Then:
    await call.send(sse(chunks(*TOKENS[:2], end=b"")) if call.request.is_stream else GOOD_PLAIN[:-5])
    await call.wait_left()
    return "close"


@pytest.mark.parametrize("way", [(), (b"Connection: upgrade", b"Upgrade: nothing")], ids=["fast_path", "aiohttp"])
@pytest.mark.parametrize("body", [PLAIN_BODY, STREAM_BODY], ids=["plain", "stream"])
@pytest.mark.parametrize("act", [never, half])
@pytest.mark.parametrize("how", ["reset", "close", "half close"])
async def test_the_upstream_is_told_at_once_when_a_client_leaves(serve, way, body, act, how) -> None:
    served = await serve(act)
    client = await served.connect()
    client.send(post(body, b"X-Request-Id: a", *way))
    await wait_until(lambda: served.upstream.begun["a"])

    if how == "reset":
        client.leave()
    elif how == "close":
        client.writer.close()
    else:
        client.writer.write_eof()

    await wait_until(lambda: served.upstream.left["a"])
    await wait_until(lambda: served.proxy.forwarder.num_active == 0)
    assert served.upstream.done["a"] == 0


async def test_of_a_client_that_leaves_nothing_is_kept(serve) -> None:
    served = await serve(stream_long)
    client = await served.connect()
    client.send(post(STREAM_BODY, b"X-Request-Id: a"))
    await wait_until(lambda: served.upstream.begun["a"])
    (fast_path,) = _lanes_of(served)

    client.leave()
    await wait_until(lambda: served.proxy.server.num_connections == 0)

    assert fast_path.connection._timer is None  # which would keep all of it until the next request's time is over


@pytest.mark.parametrize("way", [(), (b"Connection: upgrade", b"Upgrade: nothing")], ids=["fast_path", "aiohttp"])
async def test_a_client_that_leaves_the_queue_is_never_asked_for(serve, way) -> None:
    served = await serve(never, proxy=ProxyConfig(max_in_flight=1))
    first, second = await served.connect(), await served.connect()
    first.send(post(PLAIN_BODY, b"X-Request-Id: first"))
    await wait_until(lambda: served.upstream.begun["first"])
    second.send(post(PLAIN_BODY, b"X-Request-Id: second", *way))
    await wait_until(lambda: served.proxy.forwarder.num_active == 2)

    second.leave()
    await wait_until(lambda: served.proxy.forwarder.num_active == 1)
    first.leave()

    await wait_until(lambda: served.proxy.forwarder.num_active == 0)
    assert served.upstream.begun == {"first": 1}


async def test_a_client_that_leaves_while_its_upstream_is_dialled_leaves_nothing() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = listener.getsockname()[1]
    full = [socket.socket() for _ in range(8)]  # which nobody accepts: the next one waits for ever
    for each in full:
        each.setblocking(False)
        each.connect_ex(("127.0.0.1", port))
    upstream = UpstreamConfig(url=f"http://127.0.0.1:{port}", models=("m",), health_path="")

    async with run_proxy(upstream, proxy=ProxyConfig(connect_seconds=60)) as proxy:
        client = await Client.connect(proxy.port)
        client.send(post(PLAIN_BODY))
        await wait_until(lambda: proxy.forwarder.num_active == 1)
        await asyncio.sleep(0.05)

        client.leave()

        await wait_until(lambda: proxy.forwarder.num_active == 0)
    for each in (listener, *full):
        each.close()


# Slow clients

LONG_TOKENS = [event("x" * 16_000) for _ in range(64)]
NUM_ROUNDS = 30


async def stream_long(call: Call) -> Then:
    """31 MB of events."""
    await call.send(sse(b""))
    for _ in range(NUM_ROUNDS):
        for token in LONG_TOKENS:
            await call.send(chunks(token, end=b""))
            call.upstream.num_sent += len(token)
    await call.send(chunks(TOKENS[-1], b"data: [DONE]\n\n"))
    call.is_done()
    return "keep"


@pytest.mark.parametrize("way", [(), (b"Connection: upgrade", b"Upgrade: nothing")], ids=["fast_path", "aiohttp"])
async def test_a_slow_client_holds_its_upstream_back_and_loses_nothing(serve, way) -> None:
    served = await serve(stream_long)
    client = await served.connect()
    client.writer.transport.pause_reading()

    client.send(post(STREAM_BODY, b"X-Request-Id: a", *way))
    await wait_until(lambda: served.upstream.begun["a"])
    num_sent = -1
    while num_sent != served.upstream.num_sent:  # until nothing moves any more
        num_sent = served.upstream.num_sent
        await asyncio.sleep(0.2)
    client.writer.transport.resume_reading()
    answer = await client.answer()

    assert num_sent < 24 * 2**20  # the sockets' buffers, and little more
    assert len(answer.body) == NUM_ROUNDS * sum(map(len, LONG_TOKENS)) + len(TOKENS[-1]) + len(b"data: [DONE]\n\n")


@pytest.mark.parametrize("way", [(), (b"Connection: upgrade", b"Upgrade: nothing")], ids=["fast_path", "aiohttp"])
@pytest.mark.parametrize("is_stream", [False, True], ids=["plain", "stream"])
async def test_the_connection_that_a_slow_client_had_serves_the_next_one(serve, way, is_stream) -> None:
    long = b'{"x":"%b"}' % (b"x" * 12_000_000)

    async def act(call: Call) -> Then:
        if len(call.upstream.requests) > 1:
            await call.send(GOOD_PLAIN)
        elif is_stream:
            await call.send(sse(chunks(*LONG_TOKENS * 12, TOKENS[-1], b"data: [DONE]\n\n")))
        else:
            await call.send(JSON_HEAD + length(long))
        return "keep"

    served = await serve(act, proxy=ProxyConfig(held_bytes=10**8))
    slow = await served.connect()
    slow.writer.transport.pause_reading()
    slow.send(post(STREAM_BODY if is_stream else PLAIN_BODY, *way))
    await wait_until(lambda: served.upstream.requests)
    await asyncio.sleep(0.3)
    slow.writer.transport.resume_reading()
    await slow.answer()

    answer = await served.ask(post(PLAIN_BODY))

    assert answer.body == PLAIN
    assert served.upstream.num_connections == 1


async def test_a_client_that_takes_nothing_is_cut_and_its_upstream_freed(serve) -> None:
    served = await serve(stream_long, limits=LimitsConfig(slow_client_seconds=0.3))
    client = await served.connect()
    client.writer.transport.pause_reading()

    client.send(post(STREAM_BODY, b"X-Request-Id: a"))

    await wait_until(lambda: served.upstream.left["a"])
    await wait_until(lambda: served.proxy.forwarder.num_active == 0)


async def test_a_client_that_sends_for_ever_behind_its_request_is_not_read_for_ever(serve) -> None:
    may_answer = asyncio.Event()

    async def wait(call: Call) -> Then:
        await may_answer.wait()
        await call.send(GOOD_PLAIN)
        return "keep"

    served = await serve(wait)
    client = await served.connect()
    client.send(post(PLAIN_BODY, b"X-Request-Id: a"))
    await wait_until(lambda: served.upstream.begun["a"])

    num_sent = 0
    while client.writer.transport.get_write_buffer_size() < 2**20 and num_sent < 64 * 2**20:
        client.send(b"x" * 2**16)
        num_sent += 2**16
        await asyncio.sleep(0)
    held = max(len(fast_path._unread) for fast_path in _lanes_of(served))
    may_answer.set()

    assert (await client.answer()).body == PLAIN
    assert num_sent < 64 * 2**20
    assert held < 2**19

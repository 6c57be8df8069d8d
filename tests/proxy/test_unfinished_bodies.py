"""Bodies that never end: they are bounded in sum and for each key, on the fast path and through aiohttp alike."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from brlite.config.options import KeyConfig, LimitsConfig, UpstreamConfig
from brlite.http.api_key import ApiKey
from brlite.http.body import BodyBudget, HeldBody
from brlite.proxy.buffered_response import BufferedResponse
from brlite.proxy.fast_path import ArrivingRequest
from brlite.proxy.wire.framing import LengthBody
from brlite.proxy.wire.heads import RequestHead
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import Proxy, run_proxy, wait_until
from tests.proxy.raw_client import Answer, Client, post
from tests.proxy.scripted import ScriptedUpstream, Step
from tests.proxy.scripts import GOOD_PLAIN, GOOD_STREAM

MIB = 1024 * 1024
PIECE = b'{"model":"m","user":"' + b"x" * 200 * 1024  # of a body of 1 MiB, which stays unfinished
DOORS = {"fast path": b"", "aiohttp": b"Connection: upgrade\r\nUpgrade: nothing\r\n"}
LIMITS = LimitsConfig(body_seconds=PATIENCE_SECONDS)


@pytest.fixture(params=DOORS.values(), ids=DOORS)
def door(request: pytest.FixtureRequest) -> bytes:
    """Header lines that lead a request through one of the two doors."""
    assert isinstance(request.param, bytes)
    return request.param


def begin(secret: bytes, door: bytes, *more: bytes) -> bytes:
    """The head of a request with a body of 1 MiB."""
    lines = (b"POST /v1/chat/completions HTTP/1.1", b"Host: proxy", b"Content-Type: application/json")
    own = (b"Content-Length: %d" % MIB, b"Authorization: Bearer " + secret, *more)
    return b"\r\n".join((*lines, *own)) + b"\r\n" + door + b"\r\n"


@pytest.fixture
async def proxy(request: pytest.FixtureRequest) -> AsyncIterator[Proxy]:
    """With the keys `a`, of the rules that the test gives, and `b`, without any."""
    rules = getattr(request, "param", {})
    upstream = ScriptedUpstream(Step(GOOD_PLAIN), Step(GOOD_STREAM))
    keys = (KeyConfig(name="a", key="secret-a", **rules), KeyConfig(name="b", key="secret-b"))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(upstream)
        config = UpstreamConfig(url=upstream.url, models=("m",), health_path="")
        yield await stack.enter_async_context(run_proxy(config, key=keys, limits=LIMITS))


async def ask(proxy: Proxy, secret: bytes, door: bytes) -> Answer:
    client = await Client.connect(proxy.port)
    lines = [line for line in door.split(b"\r\n") if line]
    client.send(post({"model": "m"}, b"Authorization: Bearer " + secret, *lines))
    try:
        return await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
    finally:
        client.leave()


async def hold(proxy: Proxy, secret: bytes, door: bytes, count: int) -> list[Client]:
    """So many clients that begin a body each, one after the other, and are read."""
    clients = []
    for _ in range(count):
        client = await Client.connect(proxy.port)
        clients.append(client)
        client.send(begin(secret, door) + PIECE)
        await client.writer.drain()
    return clients


async def refusals(clients: list[Client]) -> list[Answer]:
    """Those that are answered, which none with an unfinished body is unless it is refused."""
    found = []
    for client in clients:
        if client.has_answer:
            found.append(await client.answer())
    return found


async def test_300_unfinished_bodies_of_one_key_take_no_more_than_its_half(proxy: Proxy, door: bytes) -> None:
    clients = await hold(proxy, b"secret-a", door, 300)
    num_that_fit = proxy.bodies.max_bytes // 2 // len(PIECE)
    await wait_until(lambda: sum(client.has_answer for client in clients) >= 300 - num_that_fit)

    answers = await refusals(clients)
    others = await ask(proxy, b"secret-b", door)

    assert Counter(answer.status for answer in answers) == {429: 300 - num_that_fit}
    assert {answer.fields[b"retry-after"] for answer in answers} == {b"1"}
    assert {answer.fields[b"connection"] for answer in answers} == {b"close"}
    assert proxy.bodies.num_bytes <= proxy.bodies.max_bytes // 2
    assert others.status == 200
    for client in clients:
        client.leave()
    await wait_until(lambda: proxy.bodies.num_bytes == 0)
    assert (await ask(proxy, b"secret-a", door)).status == 200


async def test_bodies_of_several_keys_are_bounded_in_sum(proxy: Proxy, door: bytes) -> None:
    proxy.bodies.max_bytes = 4 * MIB
    clients = [*await hold(proxy, b"secret-a", door, 10), *await hold(proxy, b"secret-b", door, 10)]
    await wait_until(lambda: proxy.bodies.num_bytes == 20 * len(PIECE))
    proxy.bodies.max_bytes = 20 * len(PIECE)

    refused = await ask(proxy, b"secret-b", door)

    assert refused.status == 503
    assert refused.fields[b"retry-after"] == b"1"
    assert "max_body_bytes_in_flight" in str(refused.error["message"])
    for client in clients:
        client.leave()
    await wait_until(lambda: proxy.bodies.num_bytes == 0)


@pytest.mark.parametrize("proxy", [{"max_concurrent": 2}, {"requests_per_minute": 2}], indirect=True)
async def test_a_key_is_refused_by_its_limits_before_its_body_is_read(proxy: Proxy, door: bytes) -> None:
    clients = await hold(proxy, b"secret-a", door, 2)
    key = proxy.keys.find("secret-a")
    assert key is not None
    await wait_until(lambda: key.num_arriving == 2)
    third = await Client.connect(proxy.port)

    third.send(begin(b"secret-a", door, b"Expect: 100-continue"))  # and nothing of its body
    refused = await asyncio.wait_for(third.answer(), PATIENCE_SECONDS)

    assert (refused.status, refused.num_interim) == (429, 0)
    assert refused.fields[b"connection"] == b"close"
    for client in (third, *clients):
        client.leave()
    await wait_until(lambda: key.num_arriving == 0)
    assert (await ask(proxy, b"secret-a", door)).status == 200


async def test_a_body_that_is_arriving_when_the_server_stops_is_read_and_answered(proxy: Proxy, door: bytes) -> None:
    (client,) = await hold(proxy, b"secret-a", door, 1)
    await wait_until(lambda: proxy.bodies.num_bytes == len(PIECE))

    proxy.forwarder.is_draining = True
    closing = asyncio.create_task(proxy.server.close())
    await asyncio.sleep(0)
    client.send(b" " * (MIB - len(PIECE) - 2) + b'"}')
    answer = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
    client.leave()

    assert (answer.status, answer.error["code"]) == (503, "not_ready")
    assert answer.fields[b"connection"] == b"close"
    await closing


def feed_of_a_request() -> Callable[[bytes], object]:
    held = HeldBody(BodyBudget(MIB), ApiKey())
    head = RequestHead(b"POST", b"/v1/completions", {}, b"", is_http_1_0=False)
    request = ArrivingRequest(head, held, LengthBody(MIB), b"")
    return lambda piece: request.feed(piece, MIB)


def feed_of_a_response() -> Callable[[bytes], object]:
    return BufferedResponse(LengthBody(MIB)).feed


@pytest.mark.parametrize("make", [feed_of_a_request, feed_of_a_response])
def test_a_body_in_tiny_pieces_takes_little_more_than_its_bytes(make: Callable[[], Callable[[bytes], object]]) -> None:
    pieces = [b"%02x" % (number % 256) for number in range(50_000)]
    feed = make()
    tracemalloc.start()

    for piece in pieces:
        feed(bytes(bytearray(piece)))  # a piece of its own, as each read makes one

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 2 * len(pieces)

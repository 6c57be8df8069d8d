"""The tables of states at the heads of `fast_path.py`, `exchange.py` and `attempt.py`: each change in them happens."""

from __future__ import annotations

import enum
from unittest.mock import Mock

from brlite.config.options import ProxyConfig, UpstreamConfig
from brlite.http.api_key import ApiKey
from brlite.proxy.request_model import Inbound
from brlite.proxy.wire.heads import RequestHead
from tests.proxy.conftest import TRANSITIONS
from tests.proxy.proxies import Proxy, run_proxy, wait_until
from tests.proxy.raw_client import Client, post
from tests.proxy.scripted import Call, ScriptedUpstream, Then
from tests.proxy.scripts import CHUNKED, GOOD_PLAIN, GOOD_STREAM, HELD_BYTES, JSON_HEAD, PLAIN, chunks, length
from tests.proxy.services import free_port

BODY = b'{"model":"m"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
LONG = b'"%b"' % (b"x" * 16 * HELD_BYTES)


async def answer(call: Call) -> Then:
    """What the body wants."""
    kind = call.request.body.get("want")
    if kind == "wait":
        await call.wait_left()
    answers = {
        None: GOOD_PLAIN,
        "stream": GOOD_STREAM,
        "chunks": JSON_HEAD + CHUNKED + b"\r\n" + chunks(PLAIN),
        "long": JSON_HEAD + length(LONG),
    }
    await call.send(answers[kind])
    return "keep"


async def ask(proxy: Proxy, request: bytes) -> int:
    client = await Client.connect(proxy.port)
    client.send(request)
    status = (await client.answer()).status
    client.leave()
    return status


async def in_pieces(proxy: Proxy, head: bytes, rest: bytes) -> Client:
    client = await Client.connect(proxy.port)
    client.send(head)
    await wait_until(lambda: proxy.bodies.num_bytes > 0)
    client.send(rest)
    return client


async def requests_of_each_kind(proxy: Proxy) -> list[int]:
    """Statuses of requests that are answered: whole ones, in pieces, forwarded or not."""
    whole = [post({"model": "m", "want": want}) for want in (None, "stream", "chunks", "long")]
    others = [post({"model": "none"}), post({"model": "m"}, path=b"http://a/v1/completions"), post({"model": "gone"})]
    others += [b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"]
    statuses = [await ask(proxy, request) for request in (*whole, *others)]
    sized, chunked = HEAD + b"Content-Length: %d\r\n" % len(BODY), HEAD + CHUNKED
    looped = b"Via: %b\r\n" % b", ".join([b"1.1 x"] * 8)
    for head, rest in (
        (sized, BODY),
        (sized, BODY.replace(b"m", b"n")),
        (sized + looped, BODY),
        (chunked, b"fff is no size\r\n"),
    ):
        client = await in_pieces(proxy, head + b"\r\n" + rest[:3], rest[3:])
        statuses.append((await client.answer()).status)
        client.leave()
    return statuses


async def leave_at_each_moment(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Clients that leave: before a request, within a body, in the queue, while an upstream works."""
    new, within = await Client.connect(proxy.port), await Client.connect(proxy.port)
    within.send(HEAD + b"Content-Length: 99\r\n\r\n{")
    await wait_until(lambda: proxy.bodies.num_bytes == 1)
    running, waiting, next_one = [await Client.connect(proxy.port) for _ in range(3)]
    running.send(post({"model": "m", "want": "wait"}))
    await wait_until(lambda: upstream.num_busy == 1)
    waiting.send(post({"model": "m"}))
    next_one.send(post({"model": "gone"}))  # its fallback is at its limit
    await wait_until(lambda: proxy.forwarder.num_active == 3)
    waiting.leave()
    await wait_until(lambda: proxy.forwarder.num_active == 2)
    for client in (new, within, running):
        client.leave()
    assert (await next_one.answer()).status == 200
    next_one.leave()


def leave_before_the_start(proxy: Proxy) -> None:
    route = proxy.forwarder.table.find("m")
    assert route is not None
    head = RequestHead(b"POST", b"/v1/completions", {}, b"", is_http_1_0=False)
    proxy.forwarder.forward(Inbound(head, BODY, ApiKey(), "m", None), route, Mock(request_id="r")).client_left()


async def test_each_change_of_the_tables_happens(transitions: set[tuple[enum.Enum, enum.Enum]]) -> None:
    gone = UpstreamConfig(url=f"http://127.0.0.1:{free_port()}", models=("gone",), health_path="")
    proxy_config = ProxyConfig(max_in_flight=1, held_bytes=HELD_BYTES, fallbacks={"gone": ("m",)})

    async with ScriptedUpstream(act=answer) as upstream:
        config = UpstreamConfig(url=upstream.url, models=("m",), health_path="")
        async with run_proxy(config, gone, proxy=proxy_config) as proxy:
            statuses = await requests_of_each_kind(proxy)
            await leave_at_each_moment(proxy, upstream)
            leave_before_the_start(proxy)

    assert statuses == [200, 200, 200, 200, 404, 200, 200, 200, 200, 404, 508, 400]
    assert {(before, after) for before, afters in TRANSITIONS.items() for after in afters} - transitions == set()

"""A client's connection stays open while its upstream is silent: streams get comments, other answers do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from brlite.config.options import LimitsConfig, ProxyConfig, UpstreamConfig
from brlite.proxy.wire.sse_relay import COMMENT
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Client, post
from tests.proxy.scripted import Act, Call, ScriptedUpstream, Then
from tests.proxy.scripts import CHUNKED, EVENTS, OK, TOKENS, chunks, event, sse

WAYS = {"fast_path": (), "aiohttp": (b"Connection: upgrade", b"Upgrade: nothing")}
HELD_BYTES = 4096
LONG_EVENT = event("x" * 3 * HELD_BYTES)


@asynccontextmanager
async def client_of(act: Act, idle_seconds: float = PATIENCE_SECONDS) -> AsyncIterator[Client]:
    """A client of a proxy that writes a comment after 50 ms of silence, before an upstream that does so."""
    proxy = ProxyConfig(connect_seconds=PATIENCE_SECONDS, idle_seconds=idle_seconds, held_bytes=HELD_BYTES)
    async with ScriptedUpstream(act=act) as upstream:
        config = UpstreamConfig(url=upstream.url, models=("m",), health_path="")
        limits = LimitsConfig(sse_comment_seconds=0.05)
        async with run_proxy(config, proxy=proxy, limits=limits) as running:
            client = await Client.connect(running.port)
            try:
                yield client
            finally:
                client.leave()


async def next_part(client: Client) -> bytes:
    return await asyncio.wait_for(client.chunk(), PATIENCE_SECONDS)


async def read_head(client: Client) -> None:
    await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_a_silent_stream_gets_comments_before_its_first_event_and_between_two(way: tuple[bytes, ...]) -> None:
    has_comment = asyncio.Semaphore(0)

    async def pause(call: Call) -> Then:
        call.is_done()
        for part in (sse(b""), chunks(TOKENS[0], end=b""), chunks(TOKENS[1] + TOKENS[2][:9], end=b"")):
            await call.send(part)
            await has_comment.acquire()
        await call.send(chunks(TOKENS[2][9:], *TOKENS[3:], b"data: [DONE]\n\n"))
        return "keep"

    async with client_of(pause) as client:
        client.send(post({"model": "m", "stream": True}, *way))
        await read_head(client)
        received = b""
        for num_whole in range(3):
            while not received.endswith(COMMENT) or received.replace(COMMENT, b"") != b"".join(TOKENS[:num_whole]):
                received += await next_part(client)
            has_comment.release()
        while part := await next_part(client):
            received += part

    assert received.replace(COMMENT, b"") == EVENTS
    assert received.startswith(COMMENT)


async def test_comments_do_not_extend_the_upstreams_time() -> None:
    async def fall_silent(call: Call) -> Then:
        await call.send(sse(chunks(TOKENS[0], end=b"")))
        await call.wait_left()
        return "close"

    async with client_of(fall_silent, idle_seconds=2) as client:
        client.send(post({"model": "m", "stream": True}))
        await read_head(client)
        parts = []
        while part := await next_part(client):
            parts.append(part)

    assert parts[0] == TOKENS[0]
    assert COMMENT in parts[1:-1]
    assert b"The upstream stopped answering." in parts[-1]


@pytest.mark.parametrize("kind", [b"audio/mpeg", b"text/event-stream"])
async def test_neither_other_media_nor_half_an_event_get_comments(kind: bytes) -> None:
    async def pause(call: Call) -> Then:
        call.is_done()
        await call.send(OK + b"Content-Type: %b\r\n" % kind + CHUNKED + b"\r\n")
        await call.send(chunks(LONG_EVENT[:9000], end=b""))
        await asyncio.sleep(0.3)
        await call.send(chunks(LONG_EVENT[9000:], event("", "stop"), b"data: [DONE]\n\n"))
        return "keep"

    async with client_of(pause) as client:
        client.send(post({"model": "m", "stream": True}))
        answer = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)

    payload = LONG_EVENT + event("", "stop") + b"data: [DONE]\n\n"
    assert answer.body == payload if kind == b"audio/mpeg" else answer.body.replace(COMMENT, b"") == payload
    assert LONG_EVENT in answer.body

"""One attempt with a connection in memory: its deadline, and whether it reads."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from brlite.config.options import ProxyConfig, UpstreamConfig
from brlite.proxy.attempt import FULL_READ_BYTES, Attempt
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.wire.heads import read_request
from tests.proxy.scripts import CHUNKED, OK, chunks, event

PROXY = ProxyConfig(first_byte_seconds=1000, idle_seconds=100)
HEAD = read_request(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n\r\n")
SSE_HEAD = OK + b"Content-Type: text/event-stream\r\n" + CHUNKED + b"\r\n"
LONG = chunks(event("x" * FULL_READ_BYTES), end=b"")
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: <%b>\r\n\r\n" % (b"x" * 2000)


class Transport:
    """The upstream's connection."""

    def __init__(self) -> None:
        self.is_reading, self.written = True, b""

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def is_closing(self) -> bool:
        return False


class Client:
    """The downstream. With `is_slow`, it cannot take even the head."""

    takes_chunks, request_id, peer = True, "a", None

    def __init__(self, *, is_slow: bool = False) -> None:
        self.is_slow, self.attempt, self.received = is_slow, None, b""

    def begin(self, status: int, lines: bytes, length: int | None) -> None:
        if self.is_slow:
            self.attempt.pause()

    def write(self, data: bytes) -> None:
        self.received += data


def send(client: Client) -> tuple[Attempt, Transport, Any]:
    """An attempt that has sent its request, its connection's transport, and the loop."""
    loop = asyncio.get_running_loop()
    upstream = Upstream(UpstreamConfig(url="http://u", models=("m",)), PROXY)
    connection = SimpleNamespace(transport=Transport(), holder=None, is_used=True)
    upstream.pool = SimpleNamespace(take=lambda: connection)
    attempt = client.attempt = Attempt(SimpleNamespace(), upstream, client, PROXY, loop)
    attempt.start(HEAD, b"", b"{}", is_fresh=False)
    return attempt, connection.transport, loop


async def test_interim_answers_do_not_extend_the_time_for_the_first_byte() -> None:
    attempt, transport, _ = send(Client())
    deadline = attempt.deadline

    attempt.data_received(EARLY_HINTS * 40)
    was_reading = transport.is_reading
    await asyncio.sleep(0)

    assert (was_reading, transport.is_reading) == (False, True)
    assert attempt.deadline == deadline


@pytest.mark.parametrize("is_slow", [False, True])
async def test_a_client_that_cannot_take_the_head_holds_its_upstream_back(*, is_slow: bool) -> None:
    attempt, transport, loop = send(Client(is_slow=is_slow))

    attempt.data_received(SSE_HEAD + LONG)
    await asyncio.sleep(0)

    assert transport.is_reading is not is_slow
    assert (attempt.deadline == math.inf) is is_slow
    attempt.resume()
    assert transport.is_reading
    assert attempt.deadline <= loop.time() + PROXY.idle_seconds

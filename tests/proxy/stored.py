"""A proxy of servers that store responses, and OpenAI's clients of it, one for each key."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import NamedTuple

import msgspec
import openai

from brlite.config.options import KeyConfig, LimitsConfig, UpstreamConfig
from tests.proxy.conftest import Connect
from tests.proxy.proxies import PATIENT, Proxy, run_proxy

KEYS = tuple(KeyConfig(name=name, key=f"secret-{name}", admin=True) for name in "ab")
ROUND_ROBIN = msgspec.structs.replace(PATIENT, choice="round_robin")


class Setting(NamedTuple):
    proxy: Proxy
    clients: list[openai.AsyncOpenAI]

    @property
    def url(self) -> str:
        return self.proxy.server.url

    @property
    def num_answered(self) -> list[int]:
        """How many requests each upstream has answered."""
        return [upstream.counts.outcomes["answered"] for upstream in self.proxy.forwarder.table.upstreams]


async def behind(
    stack: AsyncExitStack,
    connect: Connect,
    *urls: str,
    keys: tuple[KeyConfig, ...] = KEYS,
    max_owner_bytes: int = 10**6,
) -> Setting:
    """A proxy of these servers, used in turn, and a client for each key."""
    upstreams = [
        UpstreamConfig(url=url, name=f"u{index}", models=("toy",), health_path="") for index, url in enumerate(urls)
    ]
    limits = LimitsConfig(max_owner_bytes=max_owner_bytes)
    proxy = await stack.enter_async_context(run_proxy(*upstreams, key=keys, limits=limits, proxy=ROUND_ROBIN))
    return Setting(proxy, [connect(proxy.server.url, key.key or "") for key in keys] or [connect(proxy.server.url)])


def json_answer(value: object) -> bytes:
    body = msgspec.json.encode(value)
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def sse_event(value: object) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(value)

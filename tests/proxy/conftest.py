"""The loops, clients and requests for the tests of this folder, and a check of the states in all of them."""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import openai
import pytest
import uvloop

from brlite.config.options import LimitsConfig, ProxyConfig, UpstreamConfig
from brlite.proxy import attempt, exchange, fast_path
from tests.api_clients import openai_client
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import Proxy, run_proxy
from tests.proxy.raw_client import Answer, Client
from tests.proxy.scripted import Act, ScriptedUpstream, Step
from tests.proxy.scripts import GOOD_PLAIN, GOOD_STREAM

BODY = b'{"model":"m","stream":false}'
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\n"
HEAD = CHAT + b"Host: x\r\nContent-Type: application/json\r\n"
HIDDEN = b'POST /v1/hidden HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n{"model":"m"}'
UPGRADE = b"Connection: upgrade\r\nUpgrade: nothing\r\n"


def read_table(kind: type[enum.Enum]) -> dict[enum.Enum, set[enum.Enum]]:
    """Each state with the states that may follow it: those in its column of the table in the enum's docstring."""
    lines = [line.strip() for line in (kind.__doc__ or "").splitlines()]
    (_, *states), *rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    following: dict[enum.Enum, set[enum.Enum]] = {state: set() for state in kind}
    for column, name in enumerate(states, 1):
        words = {word for row in rows for word in re.findall("[A-Z]+", row[column])}
        following[kind[name.strip()]] = {kind[word] for word in words - {name.strip()}}
    return following


TRANSITIONS = read_table(attempt.AttemptState) | read_table(exchange.ExchangeState) | read_table(fast_path.PathState)

MakeLoop = Callable[[], asyncio.AbstractEventLoop]
# What breaks, hangs, leaves, is refused or cannot be found: there the two loops differ, in errors and in the order of
# calls. The other files run on one of them.
OF_CONNECTIONS = {
    *("test_broken_upstreams", "test_clients", "test_silent_upstreams", "test_unfinished_bodies", "test_what_passes"),
    *("test_malformed_requests", "test_what_is_not_passed_on"),
    *("test_wrong_or_silent", "test_response_downstream", "test_resolving", "test_reachable", "test_tls"),
    *("test_client", "test_connection_check", "test_connections", "test_health", "test_kept_connections"),
    "test_outcomes",
}

assert {path.stem for path in Path(__file__).parent.rglob("test_*.py")} >= OF_CONNECTIONS


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, MakeLoop]:
    """uvloop, which the commands use; for connections asyncio's own as well, which programs that embed brlite have."""
    loops: dict[str, MakeLoop] = {"uvloop": uvloop.new_event_loop}
    return loops | ({"asyncio": asyncio.new_event_loop} if item.path.stem in OF_CONNECTIONS else {})


@pytest.fixture(autouse=True)
def transitions(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[enum.Enum, enum.Enum]]]:
    """The changes of state in a test, each of which must stand in the table of its enum."""
    seen: set[tuple[enum.Enum, enum.Enum]] = set()

    def watch(kind: type, name: str) -> None:
        slot = kind.__dict__[name]

        def change(instance: object, state: enum.Enum) -> None:
            before = getattr(instance, name, state)
            if before is not state:
                seen.add((before, state))
            slot.__set__(instance, state)

        monkeypatch.setattr(kind, name, property(slot.__get__, change))

    watch(attempt.Attempt, "state")
    watch(exchange.Exchange, "state")
    watch(fast_path.FastPath, "_state")
    yield seen
    assert [(before, after) for before, after in seen if after not in TRANSITIONS[before]] == []


Connect = Callable[..., openai.AsyncOpenAI]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """`connect(url)` is OpenAI's client of that server, which tries everything once and is closed after the test."""
    async with AsyncExitStack() as stack:

        def make(url: str, api_key: str = "none") -> openai.AsyncOpenAI:
            client = openai_client(url, api_key)
            stack.push_async_callback(client.close)
            return client

        yield make


class Served:
    """A proxy, the one upstream behind it, and clients that are gone after the test."""

    def __init__(self, proxy: Proxy, upstream: ScriptedUpstream, stack: AsyncExitStack) -> None:
        self.proxy, self.upstream, self._stack = proxy, upstream, stack

    async def connect(self) -> Client:
        client = await Client.connect(self.proxy.port)
        self._stack.callback(client.leave)
        return client

    async def ask(self, data: bytes) -> Answer:
        client = await self.connect()
        client.send(data)
        return await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(act)` is a proxy before an upstream that acts so, or answers well. It must have had no complaint."""
    async with AsyncExitStack() as stack:

        async def start(
            act: Act | None = None,
            *,
            proxy: ProxyConfig | None = None,
            limits: LimitsConfig | None = None,
            models: tuple[str, ...] = ("m",),
            **options: object,
        ) -> Served:
            upstream = ScriptedUpstream(Step(GOOD_PLAIN), Step(GOOD_STREAM), act)
            await stack.enter_async_context(upstream)
            config = UpstreamConfig(url=upstream.url, models=models, health_path="")
            running = await stack.enter_async_context(run_proxy(config, proxy=proxy, limits=limits, **options))
            clients = await stack.enter_async_context(AsyncExitStack())
            served.append(Served(running, upstream, clients))
            return served[-1]

        served: list[Served] = []
        yield start
    for each in served:
        assert each.upstream.faults == []

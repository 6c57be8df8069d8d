"""Random faults under random clients, over and over: from one seed each, in virtual time.

Three upstreams are killed, stopped, deafened and restarted, and answer garbage now and then; eight clients ask, leave,
read slowly. Whatever happens, every request has one clear end, no job is done twice, and nothing is left over. To see
a failing seed again: `simulate(seed)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import NamedTuple, get_args

import pytest

from brlite.config.options import Choice, LimitsConfig, ProxyConfig, UpstreamConfig
from brlite.proxy.attempt import STALE_SECONDS
from tests.proxy.proxies import Proxy, run_proxy, wait_until
from tests.proxy.raw_client import BadAnswer, Client, Verdict, post
from tests.proxy.scripted import Call, ScriptedUpstream, Step, Then
from tests.proxy.scripts import (
    DONE,
    ERROR,
    EVENT,
    EVENTS,
    GOOD_PLAIN,
    JSON_HEAD,
    PLAIN,
    SCRIPTS,
    TOKENS,
    chunks,
    event,
    length,
    sse,
)
from tests.proxy.virtual_network import VirtualLoop

NUM_SEEDS = int(os.environ.get("BRLITE_SEEDS", "125"))
SEEDS_A_TEST = 25
NUM_CLIENTS = 8
NUM_REQUESTS = 4
NUM_FAULTS = 6
LONGEST_WAIT_SECONDS = 200.0  # the queue's limit, and three times all that one attempt may take
LONG_TOKENS = [*TOKENS[:2], *[event("x" * 20_000)] * 3, *TOKENS[2:], DONE]
LONG_EVENTS = b"".join(LONG_TOKENS)
LONG_PLAIN = b'{"text":"%b"}' % (b"y" * 100_000)
UPGRADE = (b"Connection: upgrade", b"Upgrade: nothing")

GARBAGE = [
    (script.plain, script.stream)
    for script in SCRIPTS.values()
    if script.plain_verdicts == ERROR
    and script.stream_verdicts in (ERROR, EVENT)
    and script.plain is not None
    and script.plain.when == "request"
    and script.stream_payload in (b"", EVENTS)
]
BAD_STREAMS = [
    script.stream
    for script in SCRIPTS.values()
    if script.plain is None and script.stream_verdicts == EVENT and script.stream_payload == EVENTS
]


class End(NamedTuple):
    """How a request ended: the verdict on its answer, or that its client left."""

    request_id: str
    verdict: Verdict | None


class World:
    """One simulation. Everything that it decides comes from the loop's seed."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop, self.random = loop, loop.random
        self.garbage_share = 0.0
        self.upstreams = [ScriptedUpstream(act=self.act) for _ in range(3)]
        self.ends: list[End] = []

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for upstream in self.upstreams:
                await stack.enter_async_context(upstream)
            configs = [UpstreamConfig(url=each.url, models=("m",), health_path="") for each in self.upstreams]
            limits = LimitsConfig(slow_client_seconds=20)
            async with run_proxy(*configs, proxy=self.make_config(), limits=limits) as proxy:
                self.garbage_share = self.random.choice((0.0, 0.2, 0.6))
                faults = [asyncio.create_task(self.break_one(upstream)) for upstream in self.upstreams]
                await asyncio.gather(*(self.be_client(proxy, number) for number in range(NUM_CLIENTS)))
                await self.recover(faults)
                await self.check_recovered(proxy)
        self.check_ends()

    def make_config(self) -> ProxyConfig:
        return ProxyConfig(
            choice=self.random.choice(get_args(Choice)),
            max_in_flight=self.random.choice((2, 5, 100)),
            max_queued=self.random.choice((0, 3, 100)),
            max_queue_seconds=self.random.choice((0.5, 20.0)),
            max_retries=self.random.choice((0, 1, 2)),
            max_idle_connections=self.random.choice((0, 1, 100)),
            idle_connection_seconds=self.random.choice((0.5, 60.0)),
            connect_seconds=1,
            first_byte_seconds=self.random.choice((4.0, 30.0)),
            idle_seconds=3,
            eject_failures=self.random.choice((1, 3, 100)),
            eject_seconds=self.random.choice((0.5, 10.0)),
        )

    # Upstreams

    async def act(self, call: Call) -> Then:
        """Compute for a while, then answer: well, or not."""
        # A job that is over sooner may be lost with a kept connection and be done again.
        await self.sleep(STALE_SECONDS, 2.0)
        await call.upstream.running.wait()
        is_long = call.request.body.get("long") is True
        if self.random.random() < self.garbage_share and not is_long:  # the scripts are all of short answers
            return await self.misbehave(call)
        if not call.request.is_stream:
            call.is_done()
            await call.send(JSON_HEAD + length(LONG_PLAIN) if is_long else GOOD_PLAIN)
            return "keep"
        await call.send(sse(b""))
        for token in LONG_TOKENS if is_long else (*TOKENS, DONE):
            await self.sleep(0, 0.4)
            await call.send(chunks(token, end=b""))
        call.is_done()
        await call.send(chunks())
        return "keep"

    async def misbehave(self, call: Call) -> Then:
        step: Step | None
        if call.request.is_stream and self.random.random() < 0.5:
            step = self.random.choice(BAD_STREAMS)
        else:
            plain, stream = self.random.choice(GARBAGE)
            step = stream if call.request.is_stream and stream is not None else plain
        assert step is not None
        if step.is_work:
            call.is_done()
        await call.send(step.data)
        if step.then == "stall":
            await call.wait_left(is_fault=False)
        return step.then

    async def break_one(self, upstream: ScriptedUpstream) -> None:
        for _ in range(NUM_FAULTS):
            await self.sleep(0, 6)
            fault = self.random.choice(("kill", "stop", "deaf", "reset"))
            if fault == "kill":
                await upstream.kill()
                await self.sleep(0, 4)
                await upstream.start()
            elif fault == "reset":
                await upstream.kill()
                await upstream.start()
            elif fault == "stop":
                upstream.running.clear()
                await self.sleep(0, 8)
                upstream.running.set()
            else:
                self.loop.deaf.add(upstream.port)
                await self.sleep(0, 8)
                self.loop.deaf.discard(upstream.port)

    async def recover(self, faults: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*faults)
        self.garbage_share = 0.0

    # Clients

    async def be_client(self, proxy: Proxy, number: int) -> None:
        client = await Client.connect(proxy.port)
        for count in range(NUM_REQUESTS):
            await self.sleep(0, 3)
            if client.writer.transport.is_closing() or client.reader.at_eof():
                client = await Client.connect(proxy.port)
            end = await self.ask(client, f"{number}-{count}")
            self.ends.append(end)
            if end.verdict is None:
                client = await Client.connect(proxy.port)
        client.leave()

    async def ask(self, client: Client, request_id: str) -> End:
        is_stream = self.random.random() < 0.6
        version = self.random.choice((b"1.1", b"1.1", b"1.0"))
        way = UPGRADE if version == b"1.1" and self.random.random() < 0.4 else ()
        is_long = self.random.random() < 0.3
        body = {"model": "m", "stream": is_stream, "long": is_long}
        client.send(post(body, b"X-Request-Id: " + request_id.encode(), *way, version=version))
        if self.random.random() < 0.15:
            return await self.leave(client, request_id)
        if self.random.random() < 0.15:
            await self.dawdle(client)
        answer = await asyncio.wait_for(client.answer(), LONGEST_WAIT_SECONDS)
        if version == b"1.0" or answer.fields.get(b"connection") == b"close":
            assert await client.is_closed()
            client.leave()
        return End(request_id, answer.verdict(_payload(is_stream, is_long)))

    async def leave(self, client: Client, request_id: str) -> End:
        await self.sleep(0, 4)
        if self.random.random() < 0.5:
            client.leave()
        else:
            client.writer.close()
        return End(request_id, None)

    async def dawdle(self, client: Client) -> None:
        client.writer.transport.pause_reading()
        await self.sleep(0, 8)
        client.writer.transport.resume_reading()

    async def sleep(self, shortest: float, longest: float) -> None:
        await asyncio.sleep(self.random.uniform(shortest, longest))

    # What must be so

    async def check_recovered(self, proxy: Proxy) -> None:
        await wait_until(lambda: proxy.forwarder.num_active == 0, LONGEST_WAIT_SECONDS)
        await wait_until(lambda: not any(upstream.num_busy for upstream in self.upstreams))  # who was left knows it
        for count in range(8):
            client = await Client.connect(proxy.port)
            is_stream = count % 2 == 0
            client.send(post({"model": "m", "stream": is_stream}, b"X-Request-Id: good-%d" % count))
            answer = await asyncio.wait_for(client.answer(), 10)
            assert answer.body == _payload(is_stream, False), f"though all is well again: {answer}"
            client.leave()

    def check_ends(self) -> None:
        ids = [end.request_id for end in self.ends]
        assert len(set(ids)) == len(ids) == NUM_CLIENTS * NUM_REQUESTS
        assert {end.verdict for end in self.ends} <= {"whole", "error", "error_event", None}
        for request_id in ids:
            num_done = sum(upstream.done[request_id] for upstream in self.upstreams)
            assert num_done <= 1, f"{request_id} was done {num_done} times"
        for upstream in self.upstreams:
            assert upstream.faults == []


def _payload(is_stream: bool, is_long: bool) -> bytes:
    if is_long:
        return LONG_EVENTS if is_stream else LONG_PLAIN
    return EVENTS if is_stream else PLAIN


def simulate(seed: int) -> list[End]:
    """Run the simulation of one seed. Raises an `AssertionError` that names it."""
    loop = VirtualLoop(seed)
    world = World(loop)
    try:
        loop.run_until_complete(world.run())
        loop.run_until_complete(asyncio.sleep(1))  # whoever was cut has heard of it
        tasks = asyncio.all_tasks(loop)
        assert not tasks, f"tasks are left: {tasks}"
        assert not loop.ends, f"connections are left: {len(loop.ends)}"
    except (AssertionError, BadAnswer, OSError, asyncio.TimeoutError, EOFError) as error:
        raise AssertionError(f"seed {seed}, at {loop.now:.3f} s: {error!r}") from error
    finally:
        _end(loop)
    return world.ends


def _end(loop: VirtualLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))
    loop.close()


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_A_TEST))
def test_every_request_has_one_clear_end_whatever_breaks(first) -> None:
    ends = [end for seed in range(first, min(first + SEEDS_A_TEST, NUM_SEEDS)) for end in simulate(seed)]

    assert {end.verdict for end in ends} == {"whole", "error", "error_event", None}  # so the faults were felt


def test_a_seed_always_gives_the_same() -> None:
    assert simulate(1) == simulate(1)

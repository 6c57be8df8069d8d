"""A group of upstreams that have all failed comes back as soon as one of them is well, in virtual time.

One of three fails at once and for good. The two others fail for a while and are well again: what fails fastest has the
least load, and must not get the requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import get_args

import pytest

from brlite.config.options import Choice, ProxyConfig, UpstreamConfig
from tests.proxy.proxies import Proxy, run_proxy
from tests.proxy.raw_client import Client, post
from tests.proxy.scripted import Call, ScriptedUpstream, Then
from tests.proxy.scripts import GOOD_PLAIN, UPSTREAM_ERROR, answer
from tests.proxy.virtual_network import VirtualLoop

SECONDS_ILL = 1.0
ANSWER_SECONDS = 0.3
EVERY_SECONDS = 0.04
FAILURE = answer(b"500 Internal Server Error", UPSTREAM_ERROR)

Fail = Callable[[Call], Awaitable[Then]]


async def say_500(call: Call) -> Then:
    await call.send(FAILURE)
    return "keep"


async def hang_up(call: Call) -> Then:
    return "reset"


FAILURES: dict[str, Fail] = {"500": say_500, "reset": hang_up}


class Group:
    """The three upstreams, and when each request was sent and what came."""

    def __init__(self, loop: VirtualLoop, fail: Fail) -> None:
        self._loop, self._fail = loop, fail
        self.upstreams = [ScriptedUpstream(act=self._act) for _ in range(3)]
        self.ends: list[tuple[float, int]] = []

    async def _act(self, call: Call) -> Then:
        if call.upstream is self.upstreams[0] or self._loop.now < SECONDS_ILL:
            return await self._fail(call)
        await asyncio.sleep(ANSWER_SECONDS)
        await call.send(GOOD_PLAIN)
        return "keep"

    async def run(self, choice: Choice) -> None:
        first, second, third = self.upstreams
        async with first, second, third:
            configs = [UpstreamConfig(url=each.url, models=("m",), health_path="") for each in self.upstreams]
            async with run_proxy(*configs, proxy=ProxyConfig(choice=choice)) as proxy:
                requests = []
                for number in range(200):
                    requests.append(asyncio.create_task(self._ask(proxy, number)))
                    await asyncio.sleep(EVERY_SECONDS)
                await asyncio.gather(*requests)

    async def _ask(self, proxy: Proxy, number: int) -> None:
        sent_at = self._loop.now
        client = await Client.connect(proxy.port)
        client.send(post({"model": "m", "prompt": f"{number} sheep"}, b"X-Session-Id: %d" % number))
        got = await client.answer()
        client.leave()
        self.ends.append((sent_at, got.status))


@pytest.mark.parametrize("fails", FAILURES)
@pytest.mark.parametrize("choice", get_args(Choice))
@pytest.mark.parametrize("seed", range(2))
def test_requests_are_answered_as_soon_as_one_is_well_again(seed: int, choice: Choice, fails: str) -> None:
    loop = VirtualLoop(seed)
    group = Group(loop, FAILURES[fails])
    try:
        loop.run_until_complete(group.run(choice))
        loop.run_until_complete(asyncio.sleep(1))
    finally:
        loop.close()

    failed_at = [sent_at for sent_at, status in group.ends if status != 200]
    assert failed_at  # while all are ill
    late = [round(sent_at, 2) for sent_at in failed_at if sent_at > SECONDS_ILL]
    assert len([sent_at for sent_at in late if sent_at > SECONDS_ILL + 2 * ANSWER_SECONDS and sent_at < 8]) <= 1, late
    assert len(late) <= 4, late

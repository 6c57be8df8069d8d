"""Every kind of answer, good or broken: a client gets all of it, or a clear error, whichever way it came in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from typing import Literal, NamedTuple

import pytest

from brlite.config.options import LimitsConfig, ProxyConfig, UpstreamConfig
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import Proxy, run_proxy
from tests.proxy.raw_client import Answer, BadAnswer, Client, post
from tests.proxy.scripted import ScriptedUpstream, Step
from tests.proxy.scripts import GOOD, GOOD_PLAIN, GOOD_STREAM, HELD_BYTES, PLAIN, SCRIPTS, Script, redirect

Way = Literal["fast_path", "aiohttp", "http_1_0"]
WAYS: tuple[Way, ...] = ("fast_path", "aiohttp", "http_1_0")
PATIENT = ProxyConfig(
    held_bytes=HELD_BYTES,
    choice="round_robin",
    eject_failures=1000,
    health_seconds=1000,
    connect_seconds=PATIENCE_SECONDS,
)
HASTY = ProxyConfig(
    held_bytes=HELD_BYTES,
    choice="round_robin",
    eject_failures=1000,
    health_seconds=1000,
    connect_seconds=PATIENCE_SECONDS,
    first_byte_seconds=4.0,  # a good upstream must keep to it on a busy machine, too
    idle_seconds=1.5,
)


class Case(NamedTuple):
    """One request: how it comes in, whether it asks for a stream, and whether a good replica stands beside."""

    way: Way
    is_stream: bool
    is_beside: bool

    @property
    def model(self) -> str:
        return "-".join((self.way, "stream" if self.is_stream else "plain", "beside" if self.is_beside else "alone"))


CASES = [Case(*case) for case in product(WAYS, (False, True), (False, True))]


class Scene(NamedTuple):
    proxy: Proxy
    bad: ScriptedUpstream
    good: ScriptedUpstream


@asynccontextmanager
async def proxy_before(script: Script) -> AsyncIterator[Scene]:
    """A proxy before an upstream with this script and a good one."""
    bad = ScriptedUpstream(script.plain or Step(GOOD_PLAIN), script.stream or script.plain or Step(GOOD_STREAM))
    good = ScriptedUpstream(Step(GOOD_PLAIN), Step(GOOD_STREAM))
    async with bad, good:
        models = tuple(case.model for case in CASES)
        beside = tuple(case.model for case in CASES if case.is_beside)
        upstreams = (
            UpstreamConfig(url=bad.url, models=models, health_path=""),
            UpstreamConfig(url=good.url, models=("good", *beside), health_path=""),
        )
        limits = LimitsConfig(max_body_bytes=2**24)
        async with run_proxy(*upstreams, proxy=HASTY if script.is_slow else PATIENT, limits=limits) as proxy:
            yield Scene(proxy, bad, good)


def request_of(case: Case, model: str, text: str = "hello") -> bytes:
    body = {"model": model, "stream": case.is_stream, "messages": [{"role": "user", "content": text}]}
    if case.way == "aiohttp":
        return post(body, b"Connection: upgrade", b"Upgrade: nothing", b"X-Request-Id: " + case.model.encode())
    version = b"1.0" if case.way == "http_1_0" else b"1.1"
    return post(body, b"X-Request-Id: " + case.model.encode(), version=version)


async def ask(port: int, case: Case, script: Script) -> Answer:
    """The answer to the case's request. On a connection that stays open the next request must be answered well."""
    client = await Client.connect(port)
    try:
        client.send(request_of(case, case.model, "x" * 700_000 if script.big_request else "hello"))
        answer = await client.answer()
        if answer.is_cut or case.way == "http_1_0" or answer.fields.get(b"connection") == b"close":
            assert await client.is_closed(), "more than an answer"
        else:
            client.send(post({"model": "good"}))
            assert (await client.answer()).body == PLAIN, "the next answer is another one's"
        return answer
    finally:
        client.leave()


async def try_case(scene: Scene, case: Case, script: Script) -> str | None:
    """What was wrong, if anything was."""
    try:
        answer = await asyncio.wait_for(ask(scene.proxy.port, case, script), PATIENCE_SECONDS)
    except asyncio.TimeoutError:
        return f"{case.model}: hangs"
    except (BadAnswer, AssertionError) as error:
        return f"{case.model}: {error}"
    allowed = script.stream_verdicts if case.is_stream else script.plain_verdicts
    payload = script.stream_payload if case.is_stream else script.plain_payload
    if case.is_beside and script.beside is not None:
        allowed = script.beside
    try:
        verdict = answer.verdict(payload, 200 if "whole" in allowed and script.status == 200 else script.status)
    except (BadAnswer, ValueError, KeyError) as error:
        return f"{case.model}: {error!r}"
    num_done = scene.bad.done[case.model] + scene.good.done[case.model]
    if num_done > 1:
        return f"{case.model}: done {num_done} times"
    return None if verdict in allowed else f"{case.model}: {verdict}, not {'/'.join(allowed)}; {answer.body[:300]!r}"


async def check_script(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    cases = [case for case in CASES if script.plain is not None or case.is_stream]
    cases = [case for case in cases if script.stream is not None or not case.is_stream]

    async with proxy_before(script) as scene:
        wrong = [text for text in await asyncio.gather(*(try_case(scene, case, script) for case in cases)) if text]
        assert wrong == []
        assert scene.bad.faults == scene.good.faults == []

    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("name", SCRIPTS)
async def test_an_answer_arrives_whole_or_a_clear_error_does(name, caplog) -> None:
    await check_script(SCRIPTS[name], caplog)


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"303 See Other", b"307 Temporary", b"308 Permanent"])
async def test_redirects_are_not_followed(status, caplog) -> None:
    async with ScriptedUpstream(Step(GOOD_PLAIN), Step(GOOD_STREAM)) as canary:
        await check_script(redirect(status, canary.port), caplog)

        assert canary.num_connections == 0


async def test_a_good_upstream_is_sent_each_request_once(caplog) -> None:
    async with proxy_before(GOOD) as scene:
        for case in CASES:
            assert await try_case(scene, case, GOOD) is None

        assert all(count == 1 for count in scene.bad.begun.values())

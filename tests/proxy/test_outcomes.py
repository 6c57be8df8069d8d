"""Whose doing a failure is: only upstreams' own count against them, and what they say about a request arrives."""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket

import pytest

from brlite.config.options import ProxyConfig, UpstreamConfig
from brlite.proxy.outcomes import ABOUT_THE_REQUEST, OUTCOMES, Ending, Owner, is_answer, is_own_fault
from brlite.proxy.routing.upstream import Upstream
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import Proxy, no_descriptors, run_proxy, wait_until
from tests.proxy.raw_client import Answer, Client, post
from tests.proxy.scripted import Call, ScriptedUpstream, Step, Then
from tests.proxy.scripts import GOOD_PLAIN, HELD_BYTES, PLAIN, UPSTREAM_ERROR, answer, event, sse
from tests.rows import all_rows

HTML = b"<html><head><title>413</title><style>b {}</style></head><body>Too <b>large</b> &amp; wide</body></html>"
QUICK_TO_EJECT = ProxyConfig(eject_failures=1, eject_seconds=100, held_bytes=HELD_BYTES)
WAYS = {"fast_path": (), "aiohttp": (b"Connection: upgrade", b"Upgrade: nothing")}


async def ask(proxy: Proxy, *headers: bytes, path: bytes = b"/v1/chat/completions", **fields: object) -> Answer:
    client = await Client.connect(proxy.port)
    try:
        client.send(post({"model": "m", **fields}, *headers, path=path))
        return await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
    finally:
        client.leave()


def only(proxy: Proxy) -> Upstream:
    (upstream,) = proxy.forwarder.table.upstreams
    return upstream


def is_closed(proxy: Proxy) -> bool:
    """Whether nothing has been held against the one upstream, by a breaker that one failure opens."""
    return only(proxy).breaker.state(proxy.forwarder.loop.time()) == "closed"


def config(upstream: ScriptedUpstream) -> UpstreamConfig:
    return UpstreamConfig(url=upstream.url, models=("m",), health_path="")


def test_every_ending_has_its_row_and_only_upstreams_own_ones_are_timeouts_or_failures() -> None:
    assert OUTCOMES.keys() == set(Ending)
    for row in OUTCOMES.values():
        assert row.outcome not in ("failed", "timeout") or row.owner is Owner.UPSTREAM


@pytest.mark.parametrize(
    ("error", "is_own"),
    [
        *((OSError(number, "x"), True) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EADDRNOTAVAIL)),
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (socket.gaierror(socket.EAI_SYSTEM, "x"), True),
        (socket.gaierror(socket.EAI_AGAIN, "x"), False),
        (socket.gaierror(socket.EAI_NONAME, "x"), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), False),
        (OSError(errno.EHOSTUNREACH, "x"), False),
        (TimeoutError(), False),
        (None, False),
    ],
)
def test_what_fails_for_want_of_something_here_is_not_the_upstreams_fault(error: BaseException, is_own: bool) -> None:
    assert is_own_fault(error) is is_own


@pytest.mark.parametrize("status", [400, 404, 408, 413, 418, 422, 429, 499, *ABOUT_THE_REQUEST])
@pytest.mark.parametrize(
    ("kind", "page", "words"),
    [
        (b"text/html", HTML, "413 Too large & wide"),
        (b"text/plain", b"no such\nluck \xff", "no such luck \ufffd"),
        (b"application/json", b"{not json", "{not json"),
        (b"text/html", b"", None),
    ],
    ids=["HTML", "text", "bad JSON", "nothing"],
)
async def test_an_answer_about_the_request_keeps_its_status_whatever_its_form(
    status: int, kind: bytes, page: bytes, words: str | None
) -> None:
    step = Step(answer(b"%d Whatever" % status, page, kind, b"Retry-After: 7"))
    async with ScriptedUpstream(step, step) as upstream, run_proxy(config(upstream), proxy=QUICK_TO_EJECT) as proxy:
        with all_rows() as row:
            for way, is_stream in itertools.product(WAYS, (False, True)):
                with row(way, is_stream):
                    got = await ask(proxy, *WAYS[way], stream=is_stream)

                    assert (got.status, got.fields[b"retry-after"]) == (status, b"7")
                    assert got.fields[b"content-type"].startswith(b"application/json")
                    assert str(got.error["message"]).startswith(f"The upstream answered {status}: {words or ''}")
                    assert len(str(got.error["message"])) > len("The upstream answered 400: ")
                    assert got.error["code"] == "upstream_error"
                    assert is_closed(proxy)
                    assert only(proxy).counts.outcomes["failed"] == 0


async def test_an_answer_about_the_request_that_is_json_arrives_as_it_is() -> None:
    step = Step(answer(b"501 Not Implemented", UPSTREAM_ERROR))
    async with ScriptedUpstream(step) as upstream, run_proxy(config(upstream), proxy=QUICK_TO_EJECT) as proxy:
        got = await ask(proxy, path=b"/v1/embeddings")

        assert (got.status, got.body, is_closed(proxy)) == (501, UPSTREAM_ERROR, True)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 507])
async def test_other_answers_from_500_on_count_against_it(status: int) -> None:
    assert not is_answer(status)
    step = Step(answer(b"%d Oh" % status, UPSTREAM_ERROR))
    async with ScriptedUpstream(step) as upstream, run_proxy(config(upstream), proxy=QUICK_TO_EJECT) as proxy:
        got = await ask(proxy)

        assert (got.status, is_closed(proxy)) == (status, False)


async def test_a_503_in_html_keeps_its_status_and_counts_against_it() -> None:
    step = Step(answer(b"503 Busy", b"<h1>Try later</h1>", b"text/html", b"Retry-After: 7"))
    async with ScriptedUpstream(step) as upstream, run_proxy(config(upstream), proxy=QUICK_TO_EJECT) as proxy:
        got = await ask(proxy)

        assert (got.status, got.fields[b"retry-after"]) == (503, b"7")
        assert got.error["message"] == "The upstream answered 503: Try later"
        assert got.error["code"] == "upstream_error"
        assert not is_closed(proxy)


@pytest.mark.parametrize("is_stream", [False, True], ids=["a long answer", "a long event"])
async def test_what_is_longer_than_held_bytes_goes_on_in_parts_and_counts_as_answered(is_stream: bool) -> None:
    body = answer(b"200 OK", b'{"x":"%b"}' % (b"y" * 9 * HELD_BYTES))
    long = event("x" * (9 * HELD_BYTES), "stop") + b"data: [DONE]\n\n"
    stream = sse(b"%x\r\n%b\r\n0\r\n\r\n" % (len(long), long))
    async with (
        ScriptedUpstream(Step(body), Step(stream)) as upstream,
        run_proxy(config(upstream), proxy=QUICK_TO_EJECT) as proxy,
    ):
        answers = [await ask(proxy, stream=is_stream) for _ in range(6)]

        assert {len(each.body) for each in answers} == {len(long) if is_stream else 9 * HELD_BYTES + 8}
        assert not any(each.is_cut for each in answers)
        assert (is_closed(proxy), only(proxy).counts.outcomes["answered"]) == (True, 6)


async def test_a_client_that_leaves_is_not_held_against_it() -> None:
    async def stall(call: Call) -> Then:
        await call.wait_left()
        return "keep"

    async with ScriptedUpstream(act=stall) as upstream, run_proxy(config(upstream), proxy=QUICK_TO_EJECT) as proxy:
        client = await Client.connect(proxy.port)
        client.send(post({"model": "m"}))
        await wait_until(lambda: upstream.num_busy == 1)
        client.leave()
        await wait_until(lambda: proxy.forwarder.num_active == 0)

        assert (is_closed(proxy), only(proxy).counts.outcomes["unknown"]) == (True, 1)


async def test_without_descriptors_the_proxy_says_so_and_holds_it_against_nobody() -> None:
    async with (
        ScriptedUpstream(Step(GOOD_PLAIN)) as upstream,
        run_proxy(config(upstream), proxy=QUICK_TO_EJECT) as proxy,
    ):
        client = await Client.connect(proxy.port)
        await wait_until(lambda: proxy.server.num_connections == 1)
        with no_descriptors():
            client.send(post({"model": "m"}))
            refused = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
        client.send(post({"model": "m"}))
        answered = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
        client.leave()

        assert (refused.status, refused.error["code"]) == (503, "not_ready")
        assert b"retry-after" in refused.fields
        assert (is_closed(proxy), only(proxy).counts.outcomes["failed"]) == (True, 0)
        assert answered.body == PLAIN


async def test_without_descriptors_a_kept_connection_to_another_upstream_is_used() -> None:
    async with (
        ScriptedUpstream(Step(GOOD_PLAIN)) as one,
        ScriptedUpstream(Step(GOOD_PLAIN)) as other,
        run_proxy(config(one), config(other), proxy=ProxyConfig(choice="round_robin")) as proxy,
    ):
        client = await Client.connect(proxy.port)
        answers = []
        client.send(post({"model": "m"}))
        answers.append(await asyncio.wait_for(client.answer(), PATIENCE_SECONDS))
        with no_descriptors():
            for _ in range(3):
                client.send(post({"model": "m"}))
                answers.append(await asyncio.wait_for(client.answer(), PATIENCE_SECONDS))
        client.leave()

        assert [each.body for each in answers] == [PLAIN] * 4
        assert sorted(map(len, (one.requests, other.requests))) == [0, 4]


async def test_a_stream_that_goes_wrong_after_a_long_event_has_begun_is_cut() -> None:
    stream = sse(b"fffff\r\ndata: " + b"x" * (3 * HELD_BYTES))
    async with (
        ScriptedUpstream(Step(GOOD_PLAIN), Step(stream, "close")) as upstream,
        run_proxy(config(upstream), proxy=QUICK_TO_EJECT) as proxy,
    ):
        got = await ask(proxy, stream=True)

        assert got.is_cut
        assert b"error" not in got.body
        assert not is_closed(proxy)

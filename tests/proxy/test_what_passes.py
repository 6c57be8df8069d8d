"""What passes between clients and upstreams besides bodies: listed headers, refusals in our words, odd pauses."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from brlite.config.options import ProxyConfig, UpstreamConfig
from brlite.proxy.exchange import UPSTREAM_RETRY_SECONDS, pause_seconds
from brlite.proxy.routing.client import reason_of
from brlite.proxy.wire.heads import read_answer
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Answer, Client, post
from tests.proxy.scripted import ScriptedUpstream, Step
from tests.proxy.scripts import GOOD_PLAIN, PLAIN, answer, length
from tests.proxy.services import free_port

SECRET_TEXT = b'{"error":{"message":"Incorrect API key provided: sk-operator"}}'
FAST, APPLICATION = b"/v1/chat/completions", b"http://proxy/v1/chat/completions"  # which path of ours forwards it


async def ask(port: int, *headers: bytes, path: bytes = FAST) -> Answer:
    client = await Client.connect(port)
    try:
        client.send(post({"model": "m"}, *headers, path=path))
        return await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
    finally:
        client.leave()


def config(upstream: ScriptedUpstream, name: str = "gpu-1") -> UpstreamConfig:
    return UpstreamConfig(url=upstream.url, models=("m",), name=name, health_path="")


@pytest.mark.parametrize("path", [FAST, APPLICATION])
async def test_of_a_clients_headers_the_listed_ones_and_the_configs_reach_an_upstream(path: bytes) -> None:
    sent = (b"OpenAI-Beta: x", b"OpenAI-Organization: o", b"X-Original-URL: /a", b"X-Tenant: 7", b"X-Session-Id: s")
    proxy = ProxyConfig(request_headers=("x-tenant",))

    async with ScriptedUpstream(Step(GOOD_PLAIN)) as upstream, run_proxy(config(upstream), proxy=proxy) as running:
        got = await ask(running.port, *sent, path=path)

    fields = upstream.requests[0].fields
    assert got.body == PLAIN
    assert {name: fields.get(name) for name in (b"openai-beta", b"x-tenant", b"x-session-id")} == {
        b"openai-beta": b"x",
        b"x-tenant": b"7",
        b"x-session-id": b"s",
    }
    assert not fields.keys() & {b"openai-organization", b"x-original-url"}


@pytest.mark.parametrize("path", [FAST, APPLICATION])
async def test_of_an_upstreams_headers_the_listed_ones_and_the_configs_come_back(path: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    head += b"Set-Cookie: a=b\r\nServer: nginx/1.2\r\nRefresh: 0\r\nX-Cost: 3\r\nX-RateLimit-Remaining-Tokens: 9\r\n"
    proxy = ProxyConfig(response_headers=("x-cost",))

    async with (
        ScriptedUpstream(Step(head + length(PLAIN))) as upstream,
        run_proxy(config(upstream), proxy=proxy) as running,
    ):
        got = await ask(running.port, path=path)

    assert (got.fields[b"x-cost"], got.fields[b"x-ratelimit-remaining-tokens"]) == (b"3", b"9")
    assert not got.fields.keys() & {b"set-cookie", b"refresh"}
    assert (got.fields[b"server"], got.fields[b"x-content-type-options"]) == (b"brlite", b"nosniff")


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/messages"])
async def test_a_refusal_has_the_same_headers_on_both_ways(path: bytes) -> None:
    gone = UpstreamConfig(url=f"http://127.0.0.1:{free_port()}", models=("m",), health_path="")

    async with run_proxy(gone) as running:
        fast, slow = [await ask(running.port, b"X-Request-Id: a", path=each) for each in (path, b"http://proxy" + path)]

    own = [{name: value for name, value in each.fields.items() if name != b"date"} for each in (fast, slow)]
    assert (fast.status, fast.body) == (slow.status, slow.body)
    assert own[0] == own[1]
    assert fast.fields.get(b"request-id") == (b"a" if path == b"/v1/messages" else None)


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"403 Forbidden"])
@pytest.mark.parametrize("is_text", [False, True])
async def test_an_upstream_that_refuses_our_access_is_a_502_in_our_words(
    status: bytes, is_text: bool, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = answer(status, SECRET_TEXT, b"text/plain" if is_text else b"application/json")

    async with ScriptedUpstream(Step(refusal, is_work=False)) as upstream, run_proxy(config(upstream)) as running:
        answers = [await ask(running.port) for _ in range(8)]

    assert {got.status for got in answers} == {502}
    assert all(got.error["code"] == "upstream_error" and b"sk-operator" not in got.body for got in answers)
    assert f"upstream gpu-1: The upstream refused this server's access ({status[:3].decode()})." in caplog.text
    assert "sk-operator" not in caplog.text
    assert len(upstream.requests) == 8  # what a client may have caused does not take the upstream out


async def test_another_upstream_is_asked_after_one_that_refuses_our_access() -> None:
    denied = Step(answer(b"401 Unauthorized", SECRET_TEXT), is_work=False)

    async with (
        ScriptedUpstream(denied) as wrong_key,
        ScriptedUpstream(Step(GOOD_PLAIN)) as good,
        run_proxy(config(wrong_key, "a"), config(good, "b"), proxy=ProxyConfig(choice="round_robin")) as running,
    ):
        answers = [await ask(running.port) for _ in range(4)]

    assert [got.body for got in answers] == [PLAIN] * 4
    assert wrong_key.requests


@pytest.mark.parametrize(
    "said",
    [
        "²",
        "١",  # a digit of another script
        "-1",
        "1.5",
        "",
        "soon",
        "Mon, 01 Jan 99999999999 00:00:00 GMT",
        "Mon, 01 Jan 2030 00:00:00 +99999999999999",
        "Mon, 01 Jan 2030 00:00:00 -1000000000000000000000",
        "Mon, 99 Jan 2030 99:99:99 GMT",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        ",,,",
        "\xff" * 40,
    ],
)
def test_a_pause_that_is_no_number_and_no_date_is_ignored(said: str) -> None:
    value = said.encode("utf-8")
    head = read_answer(b"HTTP/1.1 429 Busy\r\nRetry-After: %b\r\n\r\n" % value)

    assert pause_seconds(head) == UPSTREAM_RETRY_SECONDS


@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000", ""])
def test_a_date_is_in_utc_where_it_names_no_zone(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        date = time.strftime("%a, %d %b %Y %H:%M:%S", time.gmtime(time.time() + 40))
        head = read_answer(f"HTTP/1.1 429 Busy\r\nRetry-After: {date} {zone}\r\n\r\n".encode())

        assert 1 < pause_seconds(head) <= 40
    finally:
        monkeypatch.undo()
        time.tzset()


async def test_a_connection_that_cannot_be_made_says_why_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    gone = UpstreamConfig(url=f"http://127.0.0.1:{free_port()}", models=("m",), name="gpu-1", health_path="")

    async with run_proxy(gone) as running:
        got = await ask(running.port)

    assert got.status == 503
    assert "upstream gpu-1: The upstream cannot be reached. (Connection refused)" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        ConnectionAbortedError(),
        BrokenPipeError(),
        OSError(),
        EOFError(),
        asyncio.TimeoutError(),
        asyncio.IncompleteReadError(b"", 1),
    ],
)
def test_every_error_of_a_connection_has_a_reason(error: Exception) -> None:
    assert reason_of(error).strip()


@pytest.mark.parametrize("trailer", [b"A: b\n\r\n", b"GET /admin HTTP/1.1\r\n\r\n", b"A\r\n\r\n", b"A : b\r\n\r\n"])
@pytest.mark.parametrize("has_proxy", [False, True])
async def test_a_trailer_that_is_no_header_field_is_a_400_at_both_doors(trailer: bytes, has_proxy: bool) -> None:
    body = b'{"model":"m"}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
    request += b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n%b" % (len(body), body, trailer)

    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(ScriptedUpstream(Step(GOOD_PLAIN)))
        running = await stack.enter_async_context(run_proxy(*([config(upstream)] if has_proxy else ())))
        client = await Client.connect(running.port)
        client.send(request + post({"model": "m"}))
        got = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
        is_closed = await asyncio.wait_for(client.is_closed(), PATIENCE_SECONDS)
        client.leave()

    assert (got.status, is_closed, upstream.requests) == (400, True, [])

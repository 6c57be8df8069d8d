"""What a client cannot choose, and what an upstream is not told: hosts, keys, hop-by-hop headers."""

from __future__ import annotations

import asyncio

import pytest

from brlite.config.options import KeyConfig
from tests.limits import PATIENCE_SECONDS
from tests.proxy.conftest import UPGRADE
from tests.proxy.raw_client import Answer, post
from tests.proxy.scripted import Call, ScriptedUpstream, Step, Then
from tests.proxy.scripts import GOOD_PLAIN, JSON_HEAD, PLAIN, length

PLAIN_BODY = {"model": "m"}
WISHES = [
    b"X-Forwarded-Host: 127.0.0.1:%d",
    b"X-Forwarded-For: 127.0.0.1:%d",
    b"Forwarded: host=127.0.0.1:%d",
    b"X-Original-URL: http://127.0.0.1:%d/",
    b"X-Rewrite-URL: http://127.0.0.1:%d/",
    b"X-Upstream: http://127.0.0.1:%d",
    b"Proxy: http://127.0.0.1:%d",
    b"Referer: http://127.0.0.1:%d/",
]


FIELDS = ["api_base", "base_url", "url", "host", "upstream", "api_key", "proxy", "endpoint", "custom_llm_provider"]


async def test_no_header_and_no_field_chooses_a_host(serve) -> None:
    served = await serve()
    async with ScriptedUpstream(Step(GOOD_PLAIN)) as canary:
        at = f"127.0.0.1:{canary.port}"
        headers = [wish % canary.port for wish in WISHES]
        body = {"model": "m", **dict.fromkeys(FIELDS, f"http://{at}/v1")}
        absolute = post(body, *headers, path=f"http://{at}/v1/chat/completions".encode())
        with_its_host = post(body, *headers).replace(b"Host: proxy", b"Host: " + at.encode())

        answers = [await served.ask(data) for data in (post(body, *headers), absolute, with_its_host)]

        assert canary.num_connections == 0
    assert [answer.body for answer in answers] == [PLAIN] * 3


SECRETS = [
    b"Cookie: session=secret",
    b"Proxy-Authorization: Basic secret",
    b"TE: trailers",
    b"Trailer: X",
    b"Keep-Alive: timeout=secret",
    b"Accept-Encoding: gzip",
    b"Connection: X-Secret",
    b"X-Secret: secret",
]


@pytest.mark.parametrize("shown", [b"Authorization: Bearer sk-secret", b"X-Api-Key: sk-secret"])
async def test_the_clients_key_and_hop_by_hop_headers_are_not_passed_on(serve, shown) -> None:
    served = await serve(key=(KeyConfig(name="k", key="sk-secret"),))

    answer = await served.ask(post(PLAIN_BODY, shown, *SECRETS, b"Traceparent: yes"))

    assert answer.body == PLAIN
    fields = served.upstream.requests[0].fields
    assert b"secret" not in b"\n".join([*fields, *fields.values()])
    assert b"accept-encoding" not in fields
    assert fields[b"traceparent"] == b"yes"


@pytest.mark.parametrize("way", ["fast_path", "aiohttp"])
@pytest.mark.parametrize(("limits", "shown"), [({"requests_per_minute": 5}, b"5"), ({}, b"999")])
async def test_a_client_sees_its_own_limits_or_the_upstreams_and_never_both(serve, limits, shown, way) -> None:
    async def limit(call: Call) -> Then:
        await call.send(JSON_HEAD + b"X-RateLimit-Limit-Requests: 999\r\n" + length(PLAIN))
        return "keep"

    served = await serve(limit, key=(KeyConfig(name="k", key="sk-1", **limits),))
    headers = UPGRADE.split(b"\r\n")[:2] if way == "aiohttp" else ()

    answer = await served.ask(post(PLAIN_BODY, b"Authorization: Bearer sk-1", *headers))

    assert answer.fields[b"x-ratelimit-limit-requests"] == shown


async def test_a_wrong_key_reaches_no_upstream(serve) -> None:
    served = await serve(key=(KeyConfig(name="k", key="sk-secret"),))

    answers = [await served.ask(post(PLAIN_BODY, *headers)) for headers in ((), (b"Authorization: Bearer sk-no",))]

    assert [answer.status for answer in answers] == [401, 401]
    assert served.upstream.num_connections == 0


async def test_a_connection_header_of_many_names_takes_no_time(serve) -> None:
    served = await serve()
    names = b",".join(b"n%d" % n for n in range(2000))

    async def ask_at_once() -> Answer:
        return await served.ask(post(PLAIN_BODY, b"Connection: " + names))

    answers = await asyncio.wait_for(asyncio.gather(*(ask_at_once() for _ in range(50))), PATIENCE_SECONDS)

    assert [answer.body for answer in answers] == [PLAIN] * 50

"""What upstreams are told of whom a request comes from, and by which key and path they are asked."""

from __future__ import annotations

import asyncio

import pytest

from brlite.config.options import Forwarded, ProxyConfig, UpstreamConfig
from brlite.proxy.wire.heads import forwarded_lines
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Client, post
from tests.proxy.scripted import Request, ScriptedUpstream, Step
from tests.proxy.scripts import GOOD_PLAIN

WAYS = {"fast_path": (), "aiohttp": (b"Connection: upgrade", b"Upgrade: nothing")}
CLAIMS = (b"X-Forwarded-For: 6.6.6.6", b"Forwarded: for=6.6.6.6", b"X-Real-IP: 6.6.6.6")
NAMES = (b"x-forwarded-for", b"forwarded", b"x-real-ip")


async def asked(*headers: bytes, proxy: ProxyConfig | None = None, base: str = "", **options: object) -> Request:
    """What an upstream gets of a request with these headers."""
    async with ScriptedUpstream(Step(GOOD_PLAIN)) as upstream:
        config = UpstreamConfig(url=upstream.url + base, models=("m",), health_path="", **options)  # type: ignore[arg-type]
        async with run_proxy(config, proxy=proxy) as server:
            client = await Client.connect(server.port)
            client.send(post({"model": "m"}, *headers))
            assert (await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)).status == 200
            client.leave()
        return upstream.requests[0]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("off", (None, None, None)),
        ("set", (b"127.0.0.1", b"for=127.0.0.1", b"127.0.0.1")),
        ("append", (b"6.6.6.6, 127.0.0.1", b"for=6.6.6.6, for=127.0.0.1", b"6.6.6.6")),
    ],
)
async def test_whom_a_request_comes_from_is_told_as_configured_never_as_claimed(
    way: tuple[bytes, ...], mode: Forwarded, told: tuple[bytes | None, ...]
) -> None:
    request = await asked(*CLAIMS, *way, proxy=ProxyConfig(forwarded=mode))

    assert tuple(request.fields.get(name) for name in NAMES) == told


@pytest.mark.parametrize(
    ("peer", "node"),
    [
        ("2001:db8::1", b'for="[2001:db8::1]"'),
        ("::ffff:10.0.0.1", b"for=10.0.0.1"),
        ("fe80::1%eth0", b'for="[fe80::1]"'),
    ],
)
def test_addresses_of_both_families_are_written_as_rfc_7239_says(peer: str, node: bytes) -> None:
    assert b"Forwarded: %b\r\n" % node in forwarded_lines("set", peer, {})


@pytest.mark.parametrize("peer", [None, "", "a socket"])
def test_a_peer_without_an_address_is_not_told(peer: str | None) -> None:
    assert forwarded_lines("append", peer, {b"x-forwarded-for": b"6.6.6.6"}) == b""


def test_a_claim_that_is_too_long_or_no_address_is_dropped() -> None:
    lines = forwarded_lines("append", "10.0.0.1", {b"x-forwarded-for": b"6" * 2000, b"x-real-ip": b"me"})

    assert b"X-Forwarded-For: 10.0.0.1\r\n" in lines
    assert b"X-Real-IP: 10.0.0.1\r\n" in lines


@pytest.mark.parametrize(
    ("header", "sent"),
    [
        ("authorization", {b"authorization": b"Bearer sk-own"}),
        ("x-api-key", {b"x-api-key": b"sk-own"}),
        ("api-key", {b"api-key": b"sk-own"}),
        ("x-goog-api-key", {b"x-goog-api-key": b"sk-own"}),
    ],
)
async def test_an_upstreams_key_goes_where_it_looks_for_it(header: str, sent: dict[bytes, bytes]) -> None:
    claims = (b"X-Api-Key: client", b"Api-Key: client", b"X-Goog-Api-Key: client")

    request = await asked(*claims, api_key="sk-own", api_key_header=header)

    keys = {name: value for name, value in request.fields.items() if name == b"authorization" or b"api-key" in name}
    assert keys == sent


async def test_a_name_is_looked_up_and_asked() -> None:
    async with ScriptedUpstream(Step(GOOD_PLAIN)) as upstream:
        config = UpstreamConfig(url=f"http://localhost:{upstream.port}", models=("m",), health_path="")
        async with run_proxy(config, proxy=ProxyConfig(choice="round_robin")) as server:
            for _ in range(3):
                client = await Client.connect(server.port)
                client.send(post({"model": "m"}))
                assert (await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)).status == 200
                client.leave()

        assert len(upstream.requests) == 3


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("/api/paas/v4", b"/api/paas/v4/chat/completions"),
        ("/v1beta/openai/", b"/v1beta/openai/chat/completions"),
        ("/v1", b"/v1/chat/completions"),
    ],
)
async def test_the_version_of_a_base_url_is_kept(base: str, path: bytes) -> None:
    assert (await asked(base=base)).path == path

"""An event of a forwarded stream, from the upstream's bytes to the socket of the client."""

import asyncio

from brlite.config.options import ProxyConfig, UpstreamConfig
from tests.journeys.recorder import Journey, record
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Client, post
from tests.proxy.scripted import Call, ScriptedUpstream, Then
from tests.proxy.scripts import CHUNKED, SSE_HEAD, chunks, event

FIRST = ("proxy/wire/connections.py", "UpstreamConnection.data_received")
LAST = ("proxy/fast_path.py", "ForwardingCycle.write")


def journey() -> Journey:
    return asyncio.run(relay())


async def relay() -> Journey:
    may_send = asyncio.Event()

    async def send_two_events(call: Call) -> Then:
        await call.send(SSE_HEAD + CHUNKED + b"\r\n" + chunks(event("first"), end=b""))
        await may_send.wait()
        await call.send(chunks(event("second"), end=b""))
        await call.wait_left()
        return "close"

    async with ScriptedUpstream(act=send_two_events) as upstream:
        config = UpstreamConfig(url=upstream.url, models=("m",), health_path="")
        async with run_proxy(config, proxy=ProxyConfig()) as proxy:
            client = await Client.connect(proxy.port)
            client.send(post({"model": "m", "stream": True}))
            await client.reader.readuntil(b"first")
            with record(since=FIRST, until=LAST) as recorded:
                may_send.set()
                await client.reader.readuntil(b"second")
            client.leave()
    return recorded


def test_an_event_is_relayed_in_few_calls():
    relayed = journey()

    assert len(relayed.calls) <= 7
    assert len(relayed.files) <= 5

"""A forwarded request, from the client's bytes to the socket of the upstream, on connections that are open already."""

import asyncio

from brlite.config.options import ProxyConfig, UpstreamConfig
from tests.journeys.recorder import Journey, record
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Client, post
from tests.proxy.scripted import ScriptedUpstream, Step
from tests.proxy.scripts import GOOD_PLAIN, PLAIN

FIRST = ("http/connection.py", "Connection.data_received")
LAST = ("proxy/attempt.py", "Attempt._send")
BACK = ("proxy/wire/connections.py", "UpstreamConnection.data_received")
END = ("http/connection.py", "Connection.request_ended")


def journey() -> Journey:
    return asyncio.run(forward(FIRST, LAST))


async def forward(first: tuple[str, str], last: tuple[str, str]) -> Journey:
    async with ScriptedUpstream(Step(GOOD_PLAIN)) as upstream:
        config = UpstreamConfig(url=upstream.url, models=("m",), health_path="")
        async with run_proxy(config, proxy=ProxyConfig()) as proxy:
            client = await Client.connect(proxy.port)
            for _ in range(2):  # the second one finds a connection to the upstream
                with record(since=first, until=last) as recorded:
                    client.send(post({"model": "m"}))
                    answer = await client.answer()
                assert answer.body == PLAIN
            client.leave()
    return recorded


def test_a_request_is_forwarded_in_few_calls():
    request = journey()

    assert len(request.calls) <= 26
    assert len(request.files) <= 12


def test_a_short_response_comes_back_in_few_calls():
    response = asyncio.run(forward(BACK, END))

    assert len(response.calls) <= 26
    assert len(response.files) <= 12

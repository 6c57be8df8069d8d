"""A kept connection that its upstream had closed: the request goes over a new one, however late the loss is seen."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from brlite.config.options import UpstreamConfig
from brlite.proxy import attempt
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Client, post
from tests.proxy.scripts import GOOD_PLAIN, PLAIN


@pytest.fixture(params=["tcp", "unix"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    if request.param == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket"))
            server.listen()
            yield server


async def answer_one(listener: socket.socket) -> socket.socket:
    """Accept a connection, and answer one request on it."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    peer, _ = await loop.sock_accept(listener)
    peer.setblocking(False)
    assert (await loop.sock_recv(peer, 65536)).startswith(b"POST ")
    await loop.sock_sendall(peer, GOOD_PLAIN)
    return peer


async def test_a_late_loop_makes_no_error_of_a_connection_that_had_been_closed(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "STALE_SECONDS", 0.0)  # each loss is seen too late
    where = listener.getsockname()
    url = f"unix:{where}" if isinstance(where, str) else f"http://127.0.0.1:{where[1]}"
    async with run_proxy(UpstreamConfig(url=url, models=("m",), health_path="")) as proxy:
        upstream = proxy.forwarder.table.upstreams[0]
        client = await Client.connect(proxy.port)
        client.send(post({"model": "m"}))
        peer, first = await asyncio.gather(answer_one(listener), client.answer())

        peer.close()
        if next(iter(upstream.pool.connections)).has_all_arrived is None:
            client.leave()
            pytest.skip("this system does not tell what has arrived")
        next(iter(proxy.server._connections._members)).data_received(
            post({"model": "m"})
        )  # before the loop sees the end
        again = asyncio.create_task(answer_one(listener))
        second = await client.answer()
        assert second.body == PLAIN
        (await again).close()
        client.leave()

    assert [(each.status, each.body) for each in (first, second)] == [(200, PLAIN)] * 2
    assert upstream.counts.num_retries == 1
    assert (upstream.counts.outcomes["answered"], upstream.counts.outcomes["unknown"]) == (2, 1)

"""Connections to an upstream know whether what was sent last has arrived there, where the system tells."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator

import pytest

from brlite.config.address import Address
from brlite.proxy.wire.connections import ConnectionPool, UpstreamConnection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")


class Holder:
    """Notes what a connection knows when it is lost."""

    def __init__(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        connection.holder = self
        self.has_all_arrived: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, error: Exception | None) -> None:
        self.has_all_arrived.set_result(self._connection.has_all_arrived)


@pytest.fixture
async def ends() -> AsyncIterator[tuple[UpstreamConnection, socket.socket]]:
    """A connection and its other end, which the test holds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = ConnectionPool(Address(*server.getsockname()), ca_file=None, max_idle=1, idle_seconds=60)
        connection = await pool.dial()
        peer, _ = server.accept()
        with peer:
            yield connection, peer
        pool.close()


async def test_what_was_sent_to_a_connection_that_had_been_closed_never_arrives(ends) -> None:
    connection, peer = ends
    holder = Holder(connection)
    connection.transport.write(b"before")
    await asyncio.to_thread(peer.recv, 6)

    peer.close()
    connection.transport.write(b"request")

    assert await holder.has_all_arrived is False


async def test_what_was_read_has_arrived(ends) -> None:
    connection, peer = ends
    holder = Holder(connection)
    connection.transport.write(b"before")
    await asyncio.to_thread(peer.recv, 6)

    connection.transport.write(b"request")
    await asyncio.to_thread(peer.recv, 100)
    peer.close()

    assert await holder.has_all_arrived is True

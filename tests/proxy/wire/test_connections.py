"""Connections know whether what was sent last has arrived at the upstream, where the system tells; all are closed."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from brlite.config.address import Address, parse_address
from brlite.proxy.wire.connections import ConnectionPool, UpstreamConnection, reset
from tests.proxy.proxies import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")


class Holder:
    """Notes what a connection knows when it is lost."""

    def __init__(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        connection.holder = self
        self.has_all_arrived: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, error: Exception | None) -> None:
        self.error = error
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


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        pytest.param(struct.pack("=120xQ72xQQ", 9, 8, 0), True, id="all"),
        pytest.param(struct.pack("=120xQ72xQQ", 8, 8, 0), False, id="one byte less"),
        pytest.param(struct.pack("=120xQ72xQQ", 9, 12, 4), True, id="sent again"),
        pytest.param(bytes(216), None, id="a kernel that fills in nothing"),
        pytest.param(bytes(104), None, id="an old kernel"),
    ],
)
def test_what_has_arrived_is_what_the_system_tells(info: bytes, expected: bool | None) -> None:
    connection = UpstreamConnection(Mock())
    connection.transport = Mock()
    connection.transport.get_extra_info.return_value = Mock(family=socket.AF_INET, getsockopt=lambda *_: info)

    assert connection.has_all_arrived is expected


async def test_a_connection_that_is_made_while_the_pool_closes_is_closed_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = ConnectionPool(Address(*server.getsockname()), ca_file=None, max_idle=1, idle_seconds=60)
        dialing = asyncio.create_task(pool.dial())
        connection = await dialing

        pool.close()
        late = asyncio.create_task(pool.dial())
        await late
        pool.adopt(late)

        assert connection.transport.is_closing()
        assert late.result().transport.is_closing()
        await wait_until(lambda: not pool.connections)


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "unread"])
async def test_what_a_unix_socket_took_was_read_if_it_ends_without_a_reset(tmp_path: Path, is_read: bool) -> None:
    address = parse_address(f"unix:{tmp_path}/socket")
    assert address is not None
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address.unix_path or "")
        server.listen()
        pool = ConnectionPool(address, ca_file=None, max_idle=1, idle_seconds=60)
        connection = await pool.dial()
        holder = Holder(connection)
        peer, _ = server.accept()

        connection.transport.write(b"request")
        if is_read:
            await asyncio.to_thread(peer.recv, 100)
        peer.close()

        has_all_arrived = await holder.has_all_arrived
        assert (has_all_arrived, holder.error is None) == (True, is_read)
        pool.close()


async def test_a_connection_may_be_reset_after_it_was_lost(ends) -> None:
    connection, _ = ends
    holder = Holder(connection)

    reset(connection.transport)
    connection.transport.abort()
    await holder.has_all_arrived
    await asyncio.sleep(0)  # asyncio closes the socket after it has said so
    reset(connection.transport)

    assert connection.transport.is_closing()

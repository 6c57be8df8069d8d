"""Connections to one upstream: dialled when there is none to spare, kept for the next request, closed when idle.

Over TCP, TLS or a Unix socket. Knows no HTTP: who holds a connection gets its bytes and its end.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import sys
from pathlib import Path
from typing import Protocol, cast

from brlite.address import Address
from brlite.errors import ConfigError
from brlite.quoting import reason
from brlite.text_file import BYTE_ORDER_MARK, read_bounded

_TCP_INFO = struct.Struct("=120xQ72xQQ")  # of Linux's: tcpi_bytes_acked, tcpi_bytes_sent, tcpi_bytes_retrans (4.19)


class Holder(Protocol):
    """Who waits for what a connection brings."""

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, error: Exception | None) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """A connection, held by one exchange or by nobody. `is_used` says that it has carried one before."""

    __slots__ = ("_pool", "holder", "idle_since", "is_used", "transport")

    transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.holder: Holder | None = None
        self.is_used = False
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.holder is not None:
            self.holder.data_received(data)
        else:
            self.transport.abort()  # nobody has asked for anything

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        if self.holder is not None:
            holder, self.holder = self.holder, None
            holder.connection_lost(exc)

    @property
    def has_sent_all(self) -> bool:
        """Whether the upstream has taken all that was written, as one that answers early has not."""
        return self.transport.get_write_buffer_size() == 0

    @property
    def has_all_arrived(self) -> bool | None:
        """Whether the upstream's system has said to have all that was sent; None where ours does not tell."""
        sock = self.transport.get_extra_info("socket")
        if sys.platform != "linux" or sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) < _TCP_INFO.size:
            return None
        num_acked, num_sent, num_sent_again = _TCP_INFO.unpack(info)
        return bool(num_acked > num_sent - num_sent_again)  # the connection's own beginning is acknowledged as a byte

    def abort(self) -> None:
        """Cut it now, without a word to its holder."""
        self.holder = None
        self.transport.abort()


class Pool:
    """The connections to one upstream; the one used last is used next, so that those too many grow old."""

    def __init__(self, address: Address, *, ca_file: str | None, max_idle: int, idle_seconds: float) -> None:
        self.address = address
        self.tls = _tls_context(ca_file) if address.is_tls else None
        self._max_idle = max_idle
        self._idle_seconds = idle_seconds
        self._idle: list[UpstreamConnection] = []
        self._timer: asyncio.TimerHandle | None = None
        self.connections: set[UpstreamConnection] = set()

    def take(self) -> UpstreamConnection | None:
        """One that is open and held by nobody, if there is any."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def dial(self) -> UpstreamConnection:
        """A new one. Raises `OSError`, of which a TLS failure is one too."""
        loop = asyncio.get_running_loop()
        if self.address.unix_path is not None:
            _, connection = await loop.create_unix_connection(self._make, self.address.unix_path)
        else:
            address = self.address
            _, connection = await loop.create_connection(self._make, address.host, address.port, ssl=self.tls)
        # Not before: of one whose dialling is cancelled, uvloop does not say that it is lost.
        if not connection.transport.is_closing():
            self.connections.add(connection)
        return connection

    def adopt(self, dialing: asyncio.Task[UpstreamConnection]) -> None:
        """Keep what a dialling brought that nobody waits for any more, if it brought anything."""
        if not dialing.cancelled() and dialing.exception() is None:
            self.put_back(dialing.result())

    def put_back(self, connection: UpstreamConnection) -> None:
        """Keep it for the next request, unless there are enough of them."""
        connection.holder = None
        if connection.transport.is_closing() or len(self._idle) >= self._max_idle:
            connection.transport.close()
            return
        connection.transport.resume_reading()  # its last client may have been slow, to the very end
        loop = asyncio.get_running_loop()
        connection.is_used = True
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._timer is None:
            self._timer = loop.call_later(self._idle_seconds, self._close_old)

    def forget(self, connection: UpstreamConnection) -> None:
        """It is closed."""
        self.connections.discard(connection)
        if connection.holder is None and connection in self._idle:
            self._idle.remove(connection)

    def retire(self) -> None:
        """Keep none from now on: those in use are closed when they are given back."""
        self._max_idle = 0
        while self._idle:
            self._idle.pop().transport.close()

    def close(self) -> None:
        """Cut them all; those in use tell their holders."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in list(self.connections):
            connection.transport.abort()

    def _close_old(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._idle and self._idle[0].idle_since + self._idle_seconds <= now:
            self._idle.pop(0).transport.close()
        if self._idle:
            self._timer = loop.call_at(self._idle[0].idle_since + self._idle_seconds, self._close_old)

    def _make(self) -> UpstreamConnection:
        return UpstreamConnection(self)


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    try:
        if ca_file is None:
            return ssl.create_default_context()
        # Given as data, since OpenSSL takes no certificate from the first line of a file with a byte order mark.
        data = read_bounded(Path(ca_file)).removeprefix(BYTE_ORDER_MARK)
        return ssl.create_default_context(cadata=data.decode("ascii", "replace").replace("\ufffd", "?"))
    except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError, a TextError a ValueError
        raise ConfigError(f"ca_file {ca_file}: cannot be used: {reason(error)}") from None

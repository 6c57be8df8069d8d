"""Connections to one upstream: opened when none is free, kept for the next request, closed when idle for too long.

Over TCP, TLS or a Unix socket. Contains no HTTP: bytes and the end of a connection are passed to its holder.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from brlite.config.address import Address
from brlite.errors import ConfigError
from brlite.files.quoting import reason
from brlite.files.text_file import BYTE_ORDER_MARK, read_bounded
from brlite.proxy.wire.resolving import NameAddresses

STAGGER_SECONDS = 0.25  # RFC 8305 §5: from the attempt to connect to one address to the attempt for the next

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, with 0 seconds: `close` sends a reset
_TCP_INFO = struct.Struct("=120xQ72xQQ")  # of Linux (4.19): tcpi_bytes_acked, tcpi_bytes_sent, tcpi_bytes_retrans
_CLOSED_BY_PEER = (b"\x07", b"\x08")  # its first byte, the state: TCP_CLOSE after a reset, TCP_CLOSE_WAIT after a FIN


def is_name(address: Address) -> bool:
    """Whether the host is a name, which has to be resolved."""
    try:
        ipaddress.ip_address(address.host)
    except ValueError:
        return address.unix_path is None
    return False


class Holder(Protocol):
    """Receives the bytes and the end of a connection."""

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, error: Exception | None) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """A connection, held by one attempt or free. `is_used` is true once it has carried a request."""

    __slots__ = ("_had_all_arrived", "_pool", "address", "holder", "idle_since", "is_used", "transport")

    transport: asyncio.Transport

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self.holder: Holder | None = None
        self.address = ""  # the IP address, or the host as configured
        self.is_used = False
        self.idle_since = 0.0
        self._had_all_arrived: bool | None = None  # at the upstream's orderly end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.holder is not None:
            self.holder.data_received(data)
        else:
            self.transport.abort()  # the upstream sent bytes without a request

    def eof_received(self) -> None:
        """Note what has arrived: with TLS the socket is closed before `connection_lost` is called."""
        self._had_all_arrived = self.has_all_arrived

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        if self.holder is not None:
            holder, self.holder = self.holder, None
            holder.connection_lost(exc)

    @property
    def is_closed_by_peer(self) -> bool:
        """Whether the system knows of the upstream's end, which the event loop may not have seen yet.

        For TLS: `has_all_arrived` is None when such a connection is lost, since its socket is closed already.
        """
        sock = self.transport.get_extra_info("socket")
        if sys.platform != "linux" or sock is None:
            return False
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) in _CLOSED_BY_PEER

    @property
    def has_sent_all(self) -> bool:
        """Whether the whole request was written to the socket. False if the upstream responds before that."""
        return self.transport.get_write_buffer_size() == 0

    @property
    def has_all_arrived(self) -> bool | None:
        """Whether the upstream got all sent bytes of a connection that is lost. None if the system does not tell."""
        sock = self.transport.get_extra_info("socket")
        if sys.platform != "linux" or sock is None:
            return self._had_all_arrived
        if sock.family == socket.AF_UNIX:
            return True  # a Unix socket that is closed before all was read gives a reset, not a FIN
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) < _TCP_INFO.size:
            return None
        num_acked, num_sent, num_sent_again = _TCP_INFO.unpack(info)
        if num_sent == 0:  # the kernel of a sandbox may leave fields empty
            return None
        return bool(num_acked > num_sent - num_sent_again)  # the SYN counts as one acknowledged byte

    def abort(self) -> None:
        """Close it at once, without a call to its holder."""
        self.holder = None
        self.transport.abort()


class ConnectionPool:
    """The connections to one upstream. The one used last is used next, so that unneeded ones become idle and close.

    If the host name has several addresses, requests take them in turn, also over kept connections. A kept connection to
    an address that the name no longer has is closed.
    """

    def __init__(
        self,
        address: Address,
        *,
        ca_file: str | None,
        max_idle: int,
        idle_seconds: float,
        names: NameAddresses | None = None,
    ) -> None:
        self.address = address
        self.names = names or (NameAddresses(address.host) if is_name(address) else None)
        self._next: list[str] = []  # the addresses that `dial` tries, in this order; set by `take`
        self._known: Sequence[str] = ()  # the name's addresses at the last `take`
        self.tls = _tls_context(ca_file) if address.is_tls else None
        self._max_idle = max_idle
        self._idle_seconds = idle_seconds
        self._idle: list[UpstreamConnection] = []
        self._timer: asyncio.TimerHandle | None = None
        self.connections: set[UpstreamConnection] = set()

    def take(self) -> UpstreamConnection | None:
        """A free connection, or None. If the name has several addresses, only one to the next address.

        Closes kept connections to addresses that the name no longer has.
        """
        if self.names is not None:
            self.names.refresh()
            if self.names.known is not self._known:
                self._known = self.names.known
                for connection in self._idle[:]:
                    if connection.address not in self._known:
                        self._idle.remove(connection)
                        connection.transport.close()
            self._next = self.names.in_turn() if len(self._known) > 1 else []
            if self._next:
                for connection in reversed(self._idle):
                    if connection.address != self._next[0] or connection.transport.is_closing():
                        continue
                    if not (self.tls and connection.is_closed_by_peer):
                        self._idle.remove(connection)
                        return connection
                return None
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing() and not (self.tls and connection.is_closed_by_peer):
                return connection
        return None

    async def dial(self) -> UpstreamConnection:
        """Open a connection. Raises `OSError`, for TLS failures too."""
        if self.names is None:
            return await self._connect(self.address.host)
        await self.names.addresses()
        addresses, self._next = self._next or self.names.in_turn(), []
        return await self._connect_to_one(addresses, self.names)

    async def _connect(self, host: str) -> UpstreamConnection:
        loop, address = asyncio.get_running_loop(), self.address
        if address.unix_path is not None:
            _, connection = await loop.create_unix_connection(self._make, address.unix_path)
        else:
            server_name = address.host if self.tls is not None else None
            _, connection = await loop.create_connection(
                self._make, host, address.port, ssl=self.tls, server_hostname=server_name
            )
        connection.address = host
        # Only here: uvloop does not call `connection_lost` of a connection that was cancelled while it was opened.
        if not connection.transport.is_closing():
            self.connections.add(connection)
        return connection

    async def _connect_to_one(self, addresses: Sequence[str], names: NameAddresses) -> UpstreamConnection:
        """Connect to the first address that answers. Attempts start `STAGGER_SECONDS` apart (RFC 8305).

        Raises the error of the first attempt that failed if all fail.
        """
        loop, waiting = asyncio.get_running_loop(), list(addresses)
        tasks: dict[asyncio.Task[UpstreamConnection], str] = {}
        first_error: BaseException | None = None
        try:
            while waiting or tasks:
                if waiting:
                    address = waiting.pop(0)
                    tasks[loop.create_task(self._connect(address))] = address
                seconds = STAGGER_SECONDS if waiting else None
                done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in tasks if task in done]:
                    address = tasks.pop(task)
                    error = task.exception()
                    names.note(address, is_reached=error is None)
                    if error is None:
                        for earlier in addresses[: addresses.index(address)]:
                            names.note(earlier, is_reached=False)
                        return task.result()
                    first_error = first_error or error
        finally:
            for task in tasks:
                task.cancel()
                task.add_done_callback(self.adopt)  # it may have finished already
        assert first_error is not None  # a name has at least one address
        raise first_error

    def adopt(self, dialing: asyncio.Task[UpstreamConnection]) -> None:
        """Keep the connection that a dial task opened, if it did, after the task's attempt has ended."""
        if not dialing.cancelled() and dialing.exception() is None:
            self.put_back(dialing.result(), asyncio.get_running_loop().time())

    def put_back(self, connection: UpstreamConnection, now: float) -> None:
        """Keep the connection for the next request, or close it if `max_idle` are kept. `now` is the loop's time."""
        connection.holder = None
        if connection.transport.is_closing() or len(self._idle) >= self._max_idle:
            connection.transport.close()
            return
        connection.transport.resume_reading()  # reading may be paused, because its last client was slow
        connection.is_used = True
        connection.idle_since = now
        self._idle.append(connection)
        if self._timer is None:
            # Only here: before Python 3.12 `get_running_loop` is a system call, one more for each request.
            self._timer = asyncio.get_running_loop().call_later(self._idle_seconds, self._close_old)

    def forget(self, connection: UpstreamConnection) -> None:
        """Remove a connection that has been closed."""
        self.connections.discard(connection)
        if connection.holder is None and connection in self._idle:
            self._idle.remove(connection)

    def drain(self) -> None:
        """Close idle connections now, and those in use when they are put back."""
        self._max_idle = 0
        while self._idle:
            self._idle.pop().transport.close()

    def close(self) -> None:
        """Abort all connections. Holders get `connection_lost`. Connections that are put back later are closed."""
        self._max_idle = 0
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


def reset(transport: asyncio.Transport) -> None:
    """Reset it: after an orderly end, clients would take a cut response without Content-Length for complete.

    Does nothing to a connection that is lost already.
    """
    sock = None if transport.is_closing() else transport.get_extra_info("socket")
    if sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    try:
        if ca_file is None:
            return ssl.create_default_context()
        # Passed as data: OpenSSL skips a certificate that begins on the same line as a byte order mark.
        data = read_bounded(Path(ca_file)).removeprefix(BYTE_ORDER_MARK)
        return ssl.create_default_context(cadata=data.decode("ascii", "replace").replace("\ufffd", "?"))
    except (OSError, ValueError) as error:  # SSLError is an OSError, TextError a ValueError
        raise ConfigError(f"ca_file {ca_file}: cannot be used: {reason(error)}") from None

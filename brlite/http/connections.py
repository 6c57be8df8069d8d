"""The open connections: limits their number, closes one to make room, and waits until all are closed.

Idle connections cost a client nothing, so they must not block other clients. At the limit, the connection that has been
idle longest is closed for a new one. Connections that never sent a request are closed first.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections import OrderedDict
from typing import Protocol

from brlite.process.waiting import within

logger = logging.getLogger(__name__)

# Connections accepted beyond `max_connections`, for probes only; at this limit the oldest is closed.
MAX_SPARE = 32
QUIET_SECONDS = 60.0  # between "there is room again" and the next line: a low limit is reached with every request


class Closable(Protocol):
    """A connection that can be closed. `connection.py` implements it."""

    @property
    def is_busy(self) -> bool:
        """Whether it has a request."""

    def make_room(self) -> None: ...
    def drain(self) -> None: ...
    def abort(self) -> None: ...


class _Group:
    """A set of connections: `new` ones without a request so far, and `idle` ones. Both from old to new.

    A connection that gets a request is removed only when `first` finds it. It is added again when it is idle.
    """

    def __init__(self) -> None:
        self.num_all = 0
        self.new: OrderedDict[Closable, None] = OrderedDict()
        self.idle: OrderedDict[Closable, None] = OrderedDict()

    def discard(self, connection: Closable) -> None:
        self.new.pop(connection, None)
        self.idle.pop(connection, None)

    def first(self) -> Closable | None:
        """The connection to close first to make room. None if all are busy."""
        for waiting in (self.new, self.idle):
            while waiting:
                connection = next(iter(waiting))
                if not connection.is_busy:
                    return connection
                del waiting[connection]
        return None


class Connections:
    """The open connections. Each is a member as long as its `start()` runs, handlers included."""

    def __init__(self, limit: int, limit_per_address: int) -> None:
        self._limit = limit
        self._limit_per_address = limit_per_address
        self._members: dict[Closable, str] = {}  # with the address that it counts for; "" beyond the limit
        self._groups_of: dict[Closable, tuple[_Group, ...]] = {}
        self._all = _Group()
        self._spare = _Group()
        self._by_address: dict[str, _Group] = {}
        self._num_closed = self._num_spare = 0  # since the last line of the log that has them
        self._is_full = False  # "reached" is in the log, "room again" not yet
        self._quiet_until = 0.0
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._members)

    def admit(self, connection: Closable, peer: str) -> bool:
        """Add a connection; an idle one may be closed for it. False if it exceeds a limit: only probes may be answered.

        `peer` is the client's IP address, "" if it has none.
        """
        address = share_of(peer)
        share = self._by_address.get(address) or _Group()
        has_room = self._make_room(share, self._limit_per_address) and self._make_room(self._all, self._limit)
        if has_room:
            groups: tuple[_Group, ...] = (self._all, self._by_address.setdefault(address, share))
        else:
            groups = (self._spare,)
            address = ""
            self._num_spare += 1
            if self._spare.num_all >= MAX_SPARE and (oldest := self._spare.first()):
                self._remove(oldest)
                oldest.make_room()
        self._members[connection] = address
        self._groups_of[connection] = groups
        self._none.clear()
        for group in groups:
            group.num_all += 1
            group.new[connection] = None
        return has_room

    def is_idle(self, connection: Closable) -> None:
        """Mark a connection as idle: its request has been answered, it waits for the next one."""
        for group in self._groups_of.get(connection, ()):
            group.new.pop(connection, None)
            group.idle[connection] = None
            group.idle.move_to_end(connection)

    def discard(self, connection: Closable) -> None:
        """Remove a connection that has ended."""
        self._remove(connection)
        is_unlogged = (self._num_spare or self._num_closed) and time.monotonic() >= self._quiet_until
        if (self._is_full or is_unlogged) and len(self._members) < max(1, self._limit // 2):
            logger.warning(
                "there is room again: %d connections were refused, %d that waited were closed for others",
                self._num_spare,
                self._num_closed,
            )
            self._num_spare = self._num_closed = 0
            self._is_full, self._quiet_until = False, time.monotonic() + QUIET_SECONDS
        if not self._members:
            self._none.set()

    def drain(self) -> None:
        """Close the idle ones now, the others after the response in progress."""
        for connection in list(self._members):
            connection.drain()

    def abort(self) -> None:
        """Cut all connections, which cancels their handlers."""
        for connection in list(self._members):
            connection.abort()

    async def wait_gone(self, seconds: float) -> bool:
        """Wait up to `seconds` until no connection is open. False if some still are."""
        try:
            await within(seconds, self._none.wait())
        except asyncio.TimeoutError:
            return False
        return True

    def _make_room(self, group: _Group, limit: int) -> bool:
        """Make room in a group for one more, if needed by closing an idle connection. False if there is none."""
        if group.num_all < limit:
            return True
        if not self._is_full and time.monotonic() >= self._quiet_until:
            self._is_full = True
            name = "max_connections" if group is self._all else "max_connections_per_address"
            logger.warning(
                "%s (%d) reached: connections that wait are closed for new ones; while none waits, more get 503",
                name,
                limit,
            )
        oldest = group.first()
        if oldest is None:
            return False
        self._num_closed += 1
        self._remove(oldest)
        oldest.make_room()
        return True

    def _remove(self, connection: Closable) -> None:
        address = self._members.pop(connection, None)
        for group in self._groups_of.pop(connection, ()):
            group.discard(connection)
            group.num_all -= 1
        if address and not self._by_address[address].num_all:
            del self._by_address[address]


def share_of(peer: str) -> str:
    """The key for counting an address's connections. For IPv6 the first 64 bits, since one client has a whole /64."""
    if ":" not in peer:
        return peer or "local"
    try:
        return str(ipaddress.ip_network((peer.partition("%")[0], 64), strict=False))
    except ValueError:
        return peer

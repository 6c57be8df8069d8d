"""The set of connections being served: how many there may be, and when the last one is gone. Knows no requests."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brlite.http.connection import Connection

logger = logging.getLogger(__name__)


class Connections:
    """A connection is in it for as long as its `start()` runs, handlers included."""

    def __init__(self, limit: int) -> None:
        self._members: set[Connection] = set()
        self._limit = limit
        self._refused = 0
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._members)

    def admit(self, connection: Connection) -> bool:
        """Take it in, unless there are too many."""
        if len(self._members) >= self._limit:
            if not self._refused:
                logger.warning("max_connections (%d) reached; more are refused with 503", self._limit)
            self._refused += 1
            return False
        self._members.add(connection)
        self._none.clear()
        return True

    def discard(self, connection: Connection) -> None:
        """Forget one that is served no more."""
        self._members.discard(connection)
        if self._refused and len(self._members) < self._limit // 2:
            logger.warning("%d connections were refused; there is room again", self._refused)
            self._refused = 0
        if not self._members:
            self._none.set()

    def retire(self) -> None:
        """Close the idle ones now, the others after the response in progress."""
        for connection in list(self._members):
            connection.retire()

    def abort(self) -> None:
        """Cut them all, which cancels their handlers."""
        for connection in list(self._members):
            connection.abort()

    async def wait_gone(self, seconds: float) -> bool:
        """Wait until there are none; False if that takes longer."""
        try:
            await asyncio.wait_for(self._none.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

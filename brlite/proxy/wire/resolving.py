"""The addresses of an upstream's name: looked up on a thread, again every 10 s while there is traffic.

A name may have the addresses of several servers (a headless service); some may not answer, and the set changes. Each
name has its own lookup thread, one at a time: a lookup that hangs delays only requests for that name.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import math
import socket
from collections.abc import Callable, Sequence
from itertools import zip_longest

from brlite.process.waiting import on_daemon_thread

logger = logging.getLogger(__name__)

LOOKUP_SECONDS = 10.0  # older addresses are looked up again; getaddrinfo gives no time to live
AVOID_SECONDS = 30.0  # how long an address that could not be reached is tried last

Lookup = Callable[[str], Sequence[str]]


def system_lookup(name: str) -> list[str]:
    """The addresses of a name by the system's resolver, IPv6 and IPv4 alternating. Raises `OSError`."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    first_has_colon = ":" in found[0]
    first = [each for each in found if (":" in each) is first_has_colon]
    second = [each for each in found if (":" in each) is not first_has_colon]
    pairs = zip_longest(first, second)
    return list(dict.fromkeys(each for pair in pairs for each in pair if each is not None))


class NameAddresses:
    """The addresses of one name, used in turn. `known` are those of the last successful lookup."""

    def __init__(self, name: str, lookup: Lookup = system_lookup, seconds: float = LOOKUP_SECONDS) -> None:
        self._name = name
        self._lookup = lookup
        self._seconds = seconds
        self._looked_up_at = 0.0
        self._pending: asyncio.Future[Sequence[str]] | None = None
        self._failed_at: dict[str, float] = {}
        self._num_turns = 0
        self.known: Sequence[str] = ()

    async def addresses(self) -> Sequence[str]:
        """The known addresses, else those that a lookup finds. Raises `OSError`. Callers share a lookup."""
        pending = self.refresh()
        if pending is None or self.known:
            return self.known
        return await asyncio.shield(pending)

    def refresh(self) -> asyncio.Future[Sequence[str]] | None:
        """Begin a lookup if the addresses are old. Returns the running lookup, or None."""
        loop = asyncio.get_running_loop()
        if self._pending is not None or (self.known and loop.time() - self._looked_up_at < self._seconds):
            return self._pending
        self._pending = pending = loop.create_future()
        try:
            found = on_daemon_thread(self._find, f"lookup-{self._name}")
        except RuntimeError as error:  # the system gives no more threads
            found = loop.create_future()
            found.set_exception(OSError(errno.ENOMEM, str(error)))
        # A second future, so that `known` is set before the callers of `addresses` go on.
        found.add_done_callback(functools.partial(self._looked_up, pending))
        return pending

    def in_turn(self) -> list[str]:
        """The known addresses, beginning with the next one each time; recently unreachable ones are last."""
        known, now = self.known, asyncio.get_running_loop().time()
        start = self._num_turns % len(known) if known else 0
        self._num_turns += 1
        turned = [*known[start:], *known[:start]]
        return sorted(turned, key=lambda address: self._failed_at.get(address, -math.inf) + AVOID_SECONDS > now)

    def note(self, address: str, is_reached: bool) -> None:
        """Remember whether an address could be reached."""
        if is_reached:
            self._failed_at.pop(address, None)
        else:
            self._failed_at[address] = asyncio.get_running_loop().time()

    def _find(self) -> Sequence[str]:
        """On the lookup's own thread. Raises `OSError` for a name without an address."""
        found = self._lookup(self._name)
        if not found:
            raise OSError(f"{self._name} has no address")
        return found

    def _looked_up(self, pending: asyncio.Future[Sequence[str]], found: asyncio.Future[Sequence[str]]) -> None:
        self._pending = None
        self._looked_up_at = pending.get_loop().time()
        if (error := found.exception()) is not None:
            logger.debug("%s cannot be looked up: %s", self._name, error)
            pending.set_exception(error)
            pending.exception()  # otherwise asyncio logs it if no caller waits
            return
        if list(found.result()) != list(self.known):
            self.known = found.result()
            self._failed_at = {each: at for each, at in self._failed_at.items() if each in self.known}
        pending.set_result(self.known)

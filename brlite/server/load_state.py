"""One model's loading as requests see it: how far it is, who waits for its end, and how long a failure is remembered.

Knows no engines and loads nothing. A request waits here; whoever loads reports here how far it is and how it ended.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from brlite.errors import BrliteError, NotReady, QueueFull
from brlite.http.fair_queue import FairQueue

RETRY_SECONDS = 5


class LoadState:
    """`stage` and `fraction` (0 to 1) say how far it has come. `has_failed` is about the last time it was tried."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.stage = "waiting"
        self.fraction = 0.0
        self.is_running = False
        self.has_failed = False
        self._name = name
        self._clock = clock
        self._is_over = False
        self._retry_time = 0.0
        self._queue = _Queue()
        self._on_change: Callable[[], None] = ignore_change

    @property
    def num_waiting(self) -> int:
        """How many requests wait for the next end; those whose wait has just ended do not count."""
        return len(self._queue.waiters)

    @property
    def wanted_since(self) -> float:
        """When the first of those who wait came; infinity if nobody waits."""
        return self._queue.since if self.num_waiting else math.inf

    def watch(self, on_change: Callable[[], None]) -> None:
        """Have `on_change` called when somebody begins to wait, or stops."""
        self._on_change = on_change

    def describe(self) -> str:
        return f"loading {self.stage} {self.fraction:.0%}"

    def report(self, stage: str, fraction: float) -> None:
        """Note how far it is."""
        self.stage, self.fraction = stage, fraction

    def check(self, max_waiting: int, tenant: str = "") -> None:
        """Raise `NotReady` or `QueueFull` for a request that would wait in vain. Tenants share the queue."""
        if self._is_over:
            raise stopping()
        if self._clock() < self._retry_time:
            raise self._failure()
        waiters = self._queue.waiters
        waiters.max_items = max_waiting
        num_most = max(map(waiters.count, waiters.keys), default=0)
        if len(waiters) >= max_waiting and num_most <= waiters.count(tenant) + 1:
            raise self._full()

    async def wait(self, seconds: float, tenant: str = "") -> None:
        """Return at its end. Raises `NotReady` if it fails, or takes longer than `seconds`.

        Raises `QueueFull` where the queue is full and other tenants have less of it than this one.
        It goes on without those who stop waiting; only one that has not begun is forgotten when nobody is left.
        """
        queue, waiter = self._queue, _Waiter()
        self.check(queue.waiters.max_items, tenant)
        if not len(queue.waiters):
            queue.since = self._clock()
        dropped = queue.waiters.add(tenant, waiter)
        if dropped is not None:
            dropped.end(self._full)
        self._on_change()
        try:
            await asyncio.wait_for(waiter.ended.wait(), seconds)
        except asyncio.TimeoutError:
            raise self.not_ready(f"was not loaded within {seconds:g} seconds") from None
        finally:
            queue.waiters.remove(tenant, waiter)
            self._on_change()
        if waiter.refusal is not None:
            raise waiter.refusal()

    @contextmanager
    def running(self) -> Iterator[None]:
        """While inside, something is done for it."""
        self.is_running, self.has_failed = True, False
        try:
            yield
        finally:
            self.is_running = False

    def succeed(self) -> None:
        """It is done: all who wait go on."""
        self._end(None)

    def fail(self) -> None:
        """It failed: all who wait are refused, and so is whoever comes before it may be tried again."""
        self.has_failed = True
        self._retry_time = self._clock() + RETRY_SECONDS
        self._end(self._failure)

    def refuse(self) -> None:
        """The server stops: nobody waits any more."""
        self._is_over = True
        self._end(stopping)

    def not_ready(self, what: str) -> NotReady:
        message = f"the model {self._name} {what}: {self.stage}, {self.fraction:.0%}"
        return NotReady(message, retry_after_seconds=RETRY_SECONDS)

    def _full(self) -> QueueFull:
        return QueueFull(
            f"{self.num_waiting} requests wait for the model {self._name} to be loaded; "
            f"this server queues at most {self._queue.waiters.max_items}, shared by key",
            retry_after_seconds=RETRY_SECONDS,
        )

    def _failure(self) -> NotReady:
        seconds = max(1, math.ceil(self._retry_time - self._clock()))
        return NotReady(
            f"the model {self._name} could not be loaded; the server's log says why. "
            f"It is tried again for a request that comes in {seconds} seconds or later",
            code="model_load_failed",
            retry_after_seconds=seconds,
        )

    def _end(self, refusal: Callable[[], NotReady] | None) -> None:
        queue, self._queue = self._queue, _Queue()
        while len(queue.waiters):
            queue.waiters.pop().end(refusal)
        self.report("waiting", 0.0)


class _Waiter:
    """A request that waits, until `ended`; `refusal` makes the error that it ends with, if it does."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.refusal: Callable[[], BrliteError] | None = None

    def end(self, refusal: Callable[[], BrliteError] | None) -> None:
        self.refusal = refusal
        self.ended.set()


class _Queue:
    """Those that wait for the same end, since the first of them came."""

    def __init__(self) -> None:
        self.since = math.inf
        self.waiters: FairQueue[str, _Waiter] = FairQueue(sys.maxsize)


def stopping() -> NotReady:
    """What a server that stops says to new work, and to work that waits for a model."""
    return NotReady("the server is stopping", retry_after_seconds=RETRY_SECONDS)


def ignore_change() -> None:
    """Nobody watches."""

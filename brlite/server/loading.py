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

from brlite.errors import NotReady, QueueFull

RETRY_SECONDS = 5


class Loading:
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
        return self._queue.num_waiting

    @property
    def wanted_since(self) -> float:
        """When the first of those who wait came; infinity if nobody waits."""
        return self._queue.since if self._queue.num_waiting else math.inf

    def watch(self, on_change: Callable[[], None]) -> None:
        """Have `on_change` called when somebody begins to wait, or stops."""
        self._on_change = on_change

    def describe(self) -> str:
        return f"loading {self.stage} {self.fraction:.0%}"

    def report(self, stage: str, fraction: float) -> None:
        """Note how far it is."""
        self.stage, self.fraction = stage, fraction

    def check(self, max_waiting: int) -> None:
        """Raise `NotReady` or `QueueFull` for a request that would wait in vain."""
        if self._is_over:
            raise stopping()
        if self._clock() < self._retry_time:
            raise self._failure()
        if self._queue.num_waiting >= max_waiting:
            raise QueueFull(
                f"{self._queue.num_waiting} requests wait for the model {self._name} to be loaded; "
                f"this server queues at most {max_waiting}",
                retry_after_seconds=RETRY_SECONDS,
            )

    async def wait(self, seconds: float) -> None:
        """Return at its end. Raises `NotReady` if it fails, or takes longer than `seconds`.

        It goes on without those who stop waiting; only one that has not begun is forgotten when nobody is left.
        """
        self.check(sys.maxsize)
        queue = self._queue
        queue.join(self._clock())
        self._on_change()
        try:
            await asyncio.wait_for(queue.ended.wait(), seconds)
        except asyncio.TimeoutError:
            raise self.not_ready(f"was not loaded within {seconds:g} seconds") from None
        finally:
            queue.num_waiting -= 1
            self._on_change()
        if queue.refusal is not None:
            raise queue.refusal()

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
        queue.refusal = refusal
        queue.ended.set()
        self.report("waiting", 0.0)


class _Queue:
    """Those who wait for the same end, since the first of them came."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self.since = math.inf
        self.ended = asyncio.Event()
        self.refusal: Callable[[], NotReady] | None = None

    def join(self, now: float) -> None:
        if self.num_waiting == 0:
            self.since = now
        self.num_waiting += 1


def stopping() -> NotReady:
    """What a server that stops says to new work, and to work that waits for a model."""
    return NotReady("the server is stopping", retry_after_seconds=RETRY_SECONDS)


def ignore_change() -> None:
    """Nobody watches."""

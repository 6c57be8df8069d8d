"""The state of one model's load: stage and progress, the waiting requests, and the time of the next attempt.

It loads nothing and holds no engine: the model manager reports progress and the outcome.
"""

from __future__ import annotations

import asyncio
import enum
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from brlite.errors import BrliteError, NotReady, QueueFull, stopping
from brlite.http.fair_queue import FairQueue

RETRY_SECONDS = 5


class LoadPhase(enum.Enum):
    """The phase of a load. Each event and the phase after it:

    | event                                   | IDLE    | RUNNING | FAILED  | STOPPED |
    |-----------------------------------------|---------|---------|---------|---------|
    | a download, measurement or load begins  | RUNNING |         | RUNNING | STOPPED |
    | it has ended                            |         | IDLE    |         | STOPPED |
    | it has failed                           | FAILED  | FAILED  |         | STOPPED |
    | the server stops                        | STOPPED | STOPPED | STOPPED | STOPPED |
    """

    IDLE = enum.auto()  # no load is running; the last one, if any, succeeded
    RUNNING = enum.auto()
    FAILED = enum.auto()  # the last one failed; after `RETRY_SECONDS` a request starts the next one
    STOPPED = enum.auto()  # every request is refused


class LoadState:
    """`stage` and `fraction` (0 to 1) are the progress of the load in phase RUNNING."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.stage = "waiting"
        self.fraction = 0.0
        self.phase = LoadPhase.IDLE
        self._name = name
        self._clock = clock
        self._retry_time = 0.0
        self._queue = _Queue()
        self._on_change: Callable[[], None] = lambda: None

    @property
    def num_waiting(self) -> int:
        """How many requests wait for the load to end; those whose wait has just ended do not count."""
        return len(self._queue.waiters)

    @property
    def wanted_since(self) -> float:
        """When the first waiting request arrived; infinity if none waits."""
        return self._queue.since if self.num_waiting else math.inf

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` when a request begins or stops to wait."""
        self._on_change = on_change

    def describe(self) -> str:
        return f"loading {self.stage} {self.fraction:.0%}"

    def report(self, stage: str, fraction: float) -> None:
        """Set the progress."""
        self.stage, self.fraction = str(stage), fraction  # `stage` may be a subclass of str

    def check(self, max_waiting: int, tenant: str = "") -> None:
        """Raise `NotReady` or `QueueFull` for a request that cannot be queued. Tenants share the queue."""
        if self.phase is LoadPhase.STOPPED:
            raise stopping()
        if self._clock() < self._retry_time:
            raise self._failure()
        waiters = self._queue.waiters
        waiters.max_items = max_waiting
        num_most = max(map(waiters.count, waiters.keys), default=0)
        if len(waiters) >= max_waiting and num_most <= waiters.count(tenant) + 1:
            raise self._full()

    async def wait(self, seconds: float, tenant: str = "") -> None:
        """Return when the model is loaded. Raises `NotReady` if the load fails or takes longer than `seconds`.

        Raises `QueueFull` if the queue is full and other tenants have less of it than this one. A cancelled wait does
        not stop a load that has begun.
        """
        queue, waiter = self._queue, _Waiter()
        self.check(queue.waiters.max_items, tenant)
        if not len(queue.waiters):
            queue.since = self._clock()
        dropped = queue.waiters.add(tenant, waiter)
        if dropped is not None:
            dropped.end(self._full)
        self._on_change()
        late = partial(self.not_ready, f"was not loaded within {seconds:g} seconds")
        # No `wait_for`: before Python 3.12 it may drop a cancellation.
        timer = asyncio.get_running_loop().call_later(seconds, waiter.end, late)
        try:
            await waiter.ended.wait()
        finally:
            timer.cancel()
            queue.waiters.remove(tenant, waiter)
            self._on_change()
        if waiter.refusal is not None:
            raise waiter.refusal()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model is being downloaded, measured or loaded."""
        self._enter(LoadPhase.RUNNING)
        try:
            yield
        finally:
            self._enter(LoadPhase.IDLE)

    def succeed(self) -> None:
        """The model is loaded: all waiting requests continue."""
        self._end(None)

    def fail(self) -> None:
        """The load failed: refuse the waiting requests, and new ones for `RETRY_SECONDS`."""
        self._enter(LoadPhase.FAILED)
        self._retry_time = self._clock() + RETRY_SECONDS
        self._end(self._failure)

    def refuse(self) -> None:
        """Refuse the waiting requests and all new ones, because the server stops."""
        self._enter(LoadPhase.STOPPED)
        self._end(stopping)

    def not_ready(self, what: str) -> NotReady:
        message = f"the model {self._name} {what}: {self.stage}, {self.fraction:.0%}"
        return NotReady(message, retry_after_seconds=RETRY_SECONDS)

    def _enter(self, phase: LoadPhase) -> None:
        if self.phase is not LoadPhase.STOPPED:
            self.phase = phase

    def _full(self) -> QueueFull:
        return QueueFull(
            f"{self.num_waiting} requests wait for the model {self._name} to be loaded; "
            f"this server queues at most {self._queue.waiters.max_items}, shared by key (limits.max_waiting)",
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
    """One waiting request. `refusal` makes the error that its wait ends with; None if the model was loaded."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.refusal: Callable[[], BrliteError] | None = None

    def end(self, refusal: Callable[[], BrliteError] | None) -> None:
        if not self.ended.is_set():
            self.refusal = refusal
            self.ended.set()


class _Queue:
    """The requests that wait for the same load, and when the first of them arrived."""

    def __init__(self) -> None:
        self.since = math.inf
        self.waiters: FairQueue[str, _Waiter] = FairQueue(sys.maxsize)

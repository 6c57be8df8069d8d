"""The concurrency limit of one model, shared by key, and a bounded queue of the requests that wait.

A free slot goes to the waiting key with the fewest running requests for its weight, in turn if several have as few. So
the backlog of one key delays the others at most until one of its running requests ends. Has no clock: the caller
removes requests that have waited too long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from brlite.errors import QueueFull
from brlite.http.fair_queue import FairQueue

# 5 s: the limiter has no timing data. Short beside a typical request, long enough to avoid a retry storm.
QUEUE_RETRY_SECONDS = 5


class Waiting:
    """A request in the queue. `on_turn` is called when it has got a slot, which its holder must then release.

    `on_dropped` is called if it is dropped from a full queue. Both are called from within another request's `release`
    or `wait`, and must not raise.
    """

    __slots__ = ("_key", "_queue", "on_dropped", "on_turn")

    def __init__(
        self,
        queue: FairQueue[Hashable, Waiting],
        key: Hashable,
        on_turn: Callable[[], None],
        on_dropped: Callable[[QueueFull], None],
    ) -> None:
        self._queue = queue
        self._key = key
        self.on_turn = on_turn
        self.on_dropped = on_dropped

    def leave(self) -> None:
        """Leave the queue. Does nothing after its turn has come: then its holder releases the slot."""
        self._queue.remove(self._key, self)


class ConcurrencyLimit:
    """At most `max_in_flight` requests have a slot, and `max_queued` more wait for one.

    Operations take time in proportion to the number of waiting keys, not of waiting requests.
    """

    __slots__ = (
        "_is_handing_on",
        "_max_in_flight",
        "_num_running",
        "_num_to_hand_on",
        "_queue",
        "_weights",
        "num_in_flight",
    )

    def __init__(self, max_in_flight: int, max_queued: int) -> None:
        self._max_in_flight = max_in_flight
        self._queue: FairQueue[Hashable, Waiting] = FairQueue(max_queued)
        self._num_running: dict[Hashable, int] = {}  # by key, only keys that run any
        self._weights: dict[Hashable, int] = {}  # by key, only weights other than 1
        self.num_in_flight = 0
        self._num_to_hand_on = 0
        self._is_handing_on = False

    @property
    def limits(self) -> tuple[int, int]:
        """The maximum number of slots, and of waiting requests."""
        return self._max_in_flight, self._queue.max_items

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def acquire(self, key: Hashable) -> bool:
        """Take a slot. False if none is free; while requests wait, none is."""
        if self.num_in_flight >= self._max_in_flight:
            return False
        self.num_in_flight += 1
        self._num_running[key] = self._num_running.get(key, 0) + 1
        return True

    def wait(
        self, key: Hashable, on_turn: Callable[[], None], on_dropped: Callable[[QueueFull], None], *, weight: int = 1
    ) -> Waiting:
        """Enter the queue, after `acquire` returned False. Raises `QueueFull`. The callbacks are those of `Waiting`.

        While requests wait, keys get slots in proportion to their weights. If another key fills the queue, its newest
        request is dropped.
        """
        assert self.num_in_flight >= self._max_in_flight, "a slot is free: on_turn would never be called"
        if weight != 1:
            self._weights[key] = weight
        elif self._weights:
            self._weights.pop(key, None)
        waiting = Waiting(self._queue, key, on_turn, on_dropped)
        dropped = self._queue.add(key, waiting)
        if dropped is not None:
            error = QueueFull(
                f"This model has {self._max_in_flight} requests running and {self._queue.max_items} waiting, "
                "which is as many as this server allows (proxy.max_in_flight, proxy.max_queued).",
                retry_after_seconds=QUEUE_RETRY_SECONDS,
            )
            if dropped is waiting:
                raise error
            dropped.on_dropped(error)
        return waiting

    def release(self, key: Hashable) -> None:
        """Give the slot of one of this key's requests to a waiting request, or free it."""
        num_running = self._num_running.pop(key) - 1
        if num_running:
            self._num_running[key] = num_running
        if self.num_in_flight < self._max_in_flight:
            self.num_in_flight -= 1  # no request waits while a slot is free
            return
        self._num_to_hand_on += 1
        if self._is_handing_on:
            return
        # A request may release its slot within `on_turn`, as may every one after it: a loop avoids deep recursion.
        self._is_handing_on = True
        try:
            while self._num_to_hand_on:
                self._num_to_hand_on -= 1
                if not self._queue:
                    self.num_in_flight -= 1
                    continue
                # `min` takes the first of several, and keys come in the order of their turns.
                key = min(self._queue.keys, key=lambda key: self._num_running.get(key, 0) / self._weights.get(key, 1))
                waiting = self._queue.pop(key)
                self._num_running[key] = self._num_running.get(key, 0) + 1
                waiting.on_turn()
        finally:
            self._is_handing_on = False

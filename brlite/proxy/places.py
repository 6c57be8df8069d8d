"""Places for the running requests of one model: so many, and a bounded queue of requests that wait for one.

Knows no clock and no requests. Whoever waits watches the time and leaves when it has waited long enough.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from brlite.errors import QueueFull

# Nothing here knows how long requests take. Soon enough to use a place, late enough not to be in the way.
RETRY_AFTER_SECONDS = 5


class Waiting:
    """A turn in the queue. Once `has_turn`, its holder owns a place and must give it back, whatever happened since."""

    __slots__ = ("_queue", "has_turn", "on_turn")

    def __init__(self, queue: OrderedDict[Waiting, None], on_turn: Callable[[], None]) -> None:
        self._queue = queue
        self.on_turn = on_turn
        self.has_turn = False

    def leave(self) -> None:
        """Wait no longer. After its turn came this changes nothing: the place is its holder's to give back."""
        self._queue.pop(self, None)


class Places:
    """At most `max_in_flight` requests have a place and `max_queued` more wait for one, first come, first served.

    Each operation takes the same time however many wait.
    """

    __slots__ = ("_is_handing_on", "_max_in_flight", "_max_queued", "_num_to_hand_on", "_queue", "num_in_flight")

    def __init__(self, max_in_flight: int, max_queued: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_queued = max_queued
        # Not a deque: those who leave must be gone at once, or they would pile up behind one long request.
        self._queue: OrderedDict[Waiting, None] = OrderedDict()
        self.num_in_flight = 0
        self._num_to_hand_on = 0
        self._is_handing_on = False

    @property
    def limits(self) -> tuple[int, int]:
        """How many may have a place, and how many may wait."""
        return self._max_in_flight, self._max_queued

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def take(self) -> bool:
        """Take a free place. Never past those who wait: while somebody does, none is free."""
        if self.num_in_flight >= self._max_in_flight:
            return False
        self.num_in_flight += 1
        return True

    def wait(self, on_turn: Callable[[], None]) -> Waiting:
        """Queue up, after `take` said no. `on_turn` is called with the place, from within somebody's `give_back`.

        It must not raise; it may give the place back at once. Raises `QueueFull`.
        """
        assert self.num_in_flight >= self._max_in_flight, "a place is free: nobody would ever call on_turn"
        if len(self._queue) >= self._max_queued:
            raise QueueFull(
                f"This model has {self._max_in_flight} requests running and {self._max_queued} waiting, "
                "which is as many as this server allows.",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        waiting = Waiting(self._queue, on_turn)
        self._queue[waiting] = None
        return waiting

    def give_back(self) -> None:
        """Hand the place on to whoever has waited longest, or free it."""
        if not self._queue:
            self.num_in_flight -= 1
            return
        self._num_to_hand_on += 1
        if not self._is_handing_on:
            self._hand_on()

    def _hand_on(self) -> None:
        # Whoever gets a place may give it back at once, and so may all that wait: a loop, for they can be many.
        self._is_handing_on = True
        try:
            while self._num_to_hand_on:
                self._num_to_hand_on -= 1
                self._next()
        finally:
            self._is_handing_on = False

    def _next(self) -> None:
        if not self._queue:
            self.num_in_flight -= 1
            return
        waiting, _ = self._queue.popitem(last=False)
        waiting.has_turn = True
        waiting.on_turn()

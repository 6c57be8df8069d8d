"""The requests that have not begun, or have completions that have not: how many may wait, and for how long.

A full queue is shared equally by tenants. It decides whose turn in the queue ends, and with which error; the engine
ends the request. The order in which sequences are computed is `turns.py`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

from brlite.config.options import LimitsConfig
from brlite.engine.request import Request, RequestState
from brlite.errors import QueueFull, QueueTimeout

MAX_RETRY_AFTER_SECONDS = 60


class RequestQueue(dict[str, RequestState]):
    """Requests by id, in the order of their arrival. Those that are exempt from the queue timeout do not count.

    A body with many prompts counts as one: all its requests but the first are exempt.
    """

    def __init__(self, limits: LimitsConfig, max_num_seqs: int, mean_seconds: Callable[[], float]) -> None:
        """`mean_seconds` is the mean time that requests have taken so far."""
        super().__init__()
        self._limits = limits
        self._max_num_seqs = max_num_seqs
        self._mean_seconds = mean_seconds

    def counted(self) -> list[RequestState]:
        """The requests that count towards `max_waiting`."""
        return [each for each in self.values() if not (each.is_aborted or each.request.is_exempt_from_queue_timeout)]

    def make_room(self, request: Request) -> tuple[RequestState, QueueFull] | None:
        """The waiting request to end in favour of a new one, with its error. None while the queue is not full.

        That is the newest request of the lowest class, if the new one's class comes before it. Else it is the newest
        of the tenant with most requests. Raises `QueueFull` if neither applies.
        """
        counted, most = self.counted(), self._limits.max_waiting
        if len(counted) < most:
            return None
        counts = Counter(state.request.tenant for state in counted)
        longest, num_longest = counts.most_common(1)[0]
        waiting = [state for state in reversed(counted) if not state.is_started]
        last = max(waiting, key=lambda state: state.priority, default=None)
        newest = next((each for each in waiting if each.request.tenant == longest), None)
        text = f"{len(counted)} requests are waiting; this server queues at most {most}, shared by key"
        full = QueueFull(text, retry_after_seconds=self._retry_after_seconds())
        if last is not None and last.priority > request.priority:
            newest = last
        elif newest is None or num_longest <= counts[request.tenant] + 1:
            raise full
        return newest, full

    def overdue(self, now: float) -> Iterator[tuple[RequestState, QueueTimeout]]:
        """The requests that have waited longer than `max_wait_seconds` and have not begun, each with its error."""
        limit = self._limits.max_wait_seconds
        for state in list(self.values()):
            if state.arrival_time >= now - limit:
                return  # all others arrived later
            if not (state.is_started or state.request.is_exempt_from_queue_timeout):
                text = f"the request waited in the queue for more than {limit:g} seconds"
                yield state, QueueTimeout(text, retry_after_seconds=self._retry_after_seconds())

    def _retry_after_seconds(self) -> int:
        """Time until a queued request is likely to start, from the mean time of the requests that ended."""
        num_rounds = 1 + len(self.counted()) / self._max_num_seqs
        return min(MAX_RETRY_AFTER_SECONDS, max(1, math.ceil(self._mean_seconds() * num_rounds)))

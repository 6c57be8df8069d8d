"""Bounds the requests that wait to begin: how many there may be, and for how long.

A full queue is shared equally by tenants. The queue chooses the requests that must leave it, and their errors; the
engine ends them. `turns.py` has the order in which sequences are computed.
"""

from __future__ import annotations

import math
from collections import Counter

from brlite.config.options import LimitsConfig
from brlite.engine.request import Request, RequestState
from brlite.engine.stats import EngineStats
from brlite.errors import QueueFull, QueueTimeout

MAX_RETRY_AFTER_SECONDS = 60


class RequestQueue(dict[str, RequestState]):
    """Requests by id, in the order of their arrival, until all their completions have begun.

    Those that are exempt from the queue timeout do not count. So a body with many prompts counts as one: all its
    requests but the first are exempt.
    """

    def __init__(self, limits: LimitsConfig, max_num_seqs: int, stats: EngineStats) -> None:
        super().__init__()
        self.stats = stats  # from which the time of a retry is estimated
        self._limits = limits
        self._max_num_seqs = max_num_seqs

    def counted(self) -> list[RequestState]:
        """The requests that count towards `max_waiting`."""
        return [each for each in self.values() if not (each.is_aborted or each.request.is_exempt_from_queue_timeout)]

    def make_room(self, request: Request) -> tuple[RequestState, QueueFull] | None:
        """The waiting request to end in favour of a new one that counts, with its error. None if there is room.

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
        full = QueueFull(
            f"{len(counted)} requests are waiting; "
            f"this server queues at most {most}, shared by key (limits.max_waiting)",
            retry_after_seconds=self._retry_after_seconds(),
        )
        if last is not None and last.priority > request.priority:
            newest = last
        elif newest is None or num_longest <= counts[request.tenant] + 1:
            raise full
        return newest, full

    def overdue(self, now: float) -> list[tuple[RequestState, QueueTimeout]]:
        """The requests that have waited longer than `max_wait_seconds` and have not begun, each with its error."""
        limit, states = self._limits.max_wait_seconds, list[RequestState]()
        for state in self.values():
            if state.arrival_time >= now - limit:
                break  # all others arrived later
            if not (state.is_started or state.request.is_exempt_from_queue_timeout):
                states.append(state)
        if not states:
            return []
        text = f"the request waited in the queue for more than {limit:g} seconds (limits.max_wait_seconds)"
        seconds = self._retry_after_seconds()
        return [(state, QueueTimeout(text, retry_after_seconds=seconds)) for state in states]

    def _retry_after_seconds(self) -> int:
        """Time until a queued request is likely to start, from the mean time of the requests that ended."""
        num_rounds = 1 + len(self.counted()) / self._max_num_seqs
        return min(MAX_RETRY_AFTER_SECONDS, max(1, math.ceil(self.stats.e2e_latency.mean(1.0) * num_rounds)))

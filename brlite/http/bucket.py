"""A token bucket: a budget per minute that is refilled continuously. The caller gives the time, `now`.

A full minute's budget may be taken at once. It is refilled evenly, by `per_minute / 60` each second. More may be taken
than is left: the bucket is then in debt, and gives nothing until the debt is refilled.
"""

from __future__ import annotations

import math

MINUTE = 60.0

# Seconds: far above float rounding errors, far below a difference that matters.
TOLERANCE = 1e-6


class Bucket:
    """A budget of `per_minute` units: requests or tokens. Times are seconds of a monotonic clock."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._seconds_each = MINUTE / per_minute
        # When the bucket will be full again: the only state, since the units that are missing are refilled until then.
        self._full_at = -math.inf

    def seconds_until_full(self, now: float) -> float:
        """Seconds until the budget is full again."""
        return max(0.0, self._full_at - now)

    def seconds_until(self, now: float, count: int) -> float:
        """Seconds until `count` units are left; 0 if they are now."""
        seconds = self.seconds_until_full(now) + count * self._seconds_each - MINUTE
        return seconds if seconds > TOLERANCE else 0.0

    def remaining(self, now: float) -> int:
        """How many units are left; 0 while in debt."""
        seconds = MINUTE - self.seconds_until_full(now) + TOLERANCE
        return min(self.per_minute, max(0, math.floor(seconds / self._seconds_each)))

    def take(self, now: float, count: int) -> None:
        """Take `count` units. If fewer are left, the bucket is in debt."""
        self._full_at = max(self._full_at, now) + count * self._seconds_each

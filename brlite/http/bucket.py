"""A budget of so many a minute, refilled all the time: a token bucket. It knows no keys, and no clock: `now` is given.

A whole minute's worth may be taken at once; what was taken comes back evenly, `per_minute / 60` each second. More may
be taken than is there: the bucket is in debt then, and has nothing to give until that is paid.
"""

from __future__ import annotations

import math

MINUTE = 60.0

# Seconds: far above what adding floats loses, far below what anybody could use.
TOLERANCE = 1e-6


class Bucket:
    """`per_minute` of something. Times are seconds of any clock that does not go back."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._seconds_each = MINUTE / per_minute
        # The one number of its state: what is missing is what comes in until then.
        self._full_at = -math.inf

    def seconds_until_full(self, now: float) -> float:
        """How long until all that was taken has come back."""
        return max(0.0, self._full_at - now)

    def seconds_until(self, now: float, count: int) -> float:
        """How long until so many are there; 0 if they are."""
        seconds = self.seconds_until_full(now) + count * self._seconds_each - MINUTE
        return seconds if seconds > TOLERANCE else 0.0

    def remaining(self, now: float) -> int:
        """How many are there, none while in debt."""
        seconds = MINUTE - self.seconds_until_full(now) + TOLERANCE
        return min(self.per_minute, max(0, math.floor(seconds / self._seconds_each)))

    def take(self, now: float, count: int) -> None:
        """Take so many, into debt if need be."""
        self._full_at = max(self._full_at, now) + count * self._seconds_each

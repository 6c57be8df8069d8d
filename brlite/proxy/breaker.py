"""Ejects an upstream after failures in a row, and lets one request at a time probe whether it is back.

Knows no requests and no clock: its caller says what began, how it ended and what time it is, and decides what counts as
a failure. A client's own fault (4xx) is an upstream's success.
"""

from __future__ import annotations

from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Closed until `failures` in a row; then open for `seconds`; then half-open, when one request is let through.

    If that probe succeeds the breaker closes and forgets; if it fails it opens for twice as long as before, up to
    `max_seconds`. Each `begin` must be followed by exactly one of `succeeded`, `failed` and `abandoned`.

    Outcomes do not say which request they are of. While it is open none of them changes anything: they are of requests
    that began earlier (a server that is going away still ends its streams well), or that were sent for want of a
    better upstream. While a probe is out, any outcome frees its place, a success closes and a failure opens again; but
    where others are out too, so that the failure may be one of theirs, it opens for the same time, not for twice.
    """

    __slots__ = (
        "_first_seconds",
        "_is_open",
        "_is_probing",
        "_max_failures",
        "_max_seconds",
        "_num_failures",
        "_num_others",
        "_seconds",
        "_until",
    )

    def __init__(self, failures: int, seconds: float, max_seconds: float = 120.0) -> None:
        self._max_failures = failures
        self._first_seconds = seconds
        self._max_seconds = max(seconds, max_seconds)
        self._seconds = seconds  # how long it is open this time
        self._until = 0.0
        self._is_open = False
        self._is_probing = False
        self._num_failures = 0  # in a row, while closed
        self._num_others = 0  # requests under way that are not the probe

    def allows(self, now: float) -> bool:
        """Whether a request may be given to it."""
        return not self._is_open or (self._until <= now and not self._is_probing)

    def state(self, now: float) -> State:
        if not self._is_open:
            return "closed"
        return "half_open" if self._until <= now else "open"

    def begin(self, now: float) -> None:
        """A request is given to it, allowed or not. When half-open, the first one is the probe."""
        if self._is_open and self.allows(now):
            self._is_probing = True
        else:
            self._num_others += 1

    def succeeded(self) -> None:
        if not self._is_open:
            self._num_others -= 1
            self._num_failures = 0
        elif self._end_probe():
            self._is_open = False
            self._num_failures = 0
            self._seconds = self._first_seconds

    def failed(self, now: float) -> None:
        if not self._is_open:
            self._num_others -= 1
            self._num_failures += 1
            if self._num_failures >= self._max_failures:
                self._open(now)
        elif self._end_probe():
            if self._num_others == 0:
                self._seconds = min(2 * self._seconds, self._max_seconds)
            self._open(now)

    def answers(self) -> None:
        """A request is being answered well. The probe's outcome is known by that: it may take as long as it likes."""
        if self._is_open and self._is_probing:
            self._is_probing = self._is_open = False
            self._num_others += 1
            self._num_failures = 0
            self._seconds = self._first_seconds

    def abandoned(self) -> None:
        """The client left before the outcome was known, which says nothing."""
        self._end_probe()  # if it was one, the next request is

    def _open(self, now: float) -> None:
        self._is_open = True
        self._until = now + self._seconds

    def _end_probe(self) -> bool:
        """One request is over; whether a probe was out.

        If it was not the probe itself, the probe is one of the others from now on: their number is the same either way.
        """
        was_probing = self._is_probing
        if was_probing:
            self._is_probing = False
        else:
            self._num_others -= 1
        return was_probing

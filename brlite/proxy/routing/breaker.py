"""A circuit breaker: ejects an upstream after failures in a row, and lets one request at a time probe it.

Has no clock: the caller gives times and results, and decides what counts as a failure (`outcomes.py`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["closed", "open", "half_open"]


class Ticket(NamedTuple):
    """The result of `begin`: how often the breaker had opened by then, and whether the request is the probe."""

    epoch: int
    is_probe: bool


class Breaker:
    """Closed until `failures` in a row; then open for `seconds`; then half-open: one request is let through.

    If that probe succeeds, the breaker closes; if it fails, it opens for twice as long as before, up to `max_seconds`.
    Exactly one of `succeeded`, `failed` and `abandoned` must follow each `begin`, with its ticket.

    `is_untroubled` while it is closed and the last request did not fail: then `begin` gives `ticket`, and `answers`,
    `succeeded` and `abandoned` change nothing, so that a caller may leave these calls out.

    Requests that began before it last opened change nothing while it is open: a server that shuts down still completes
    its streams. A request may be sent to an open one if no other upstream is left; its success closes it at once.
    """

    __slots__ = (
        "_epoch",
        "_first_seconds",
        "_is_open",
        "_is_probing",
        "_max_failures",
        "_max_seconds",
        "_num_failures",
        "_seconds",
        "_until",
        "is_untroubled",
        "ticket",
    )

    def __init__(self, failures: int, seconds: float, max_seconds: float = 120.0) -> None:
        self._max_failures = failures
        self._first_seconds = seconds
        self._max_seconds = max(seconds, max_seconds)
        self._seconds = seconds  # how long it is open this time
        self._until = 0.0
        self._epoch = 0  # how often it has opened
        self._is_open = False
        self._is_probing = False
        self._num_failures = 0  # in a row, while closed
        self.is_untroubled = True
        self.ticket = Ticket(0, is_probe=False)

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        return not self._is_open or (self._until <= now and not self._is_probing)

    def state(self, now: float) -> State:
        if not self._is_open:
            return "closed"
        return "half_open" if self._until <= now else "open"

    def begin(self, now: float) -> Ticket:
        """Register a request, whatever `allows` returns. When half-open, the first one is the probe."""
        if not (self._is_open and self.allows(now)):
            return self.ticket
        self._is_probing = True
        return Ticket(self._epoch, is_probe=True)

    def succeeded(self, ticket: Ticket) -> None:
        self.answers(ticket)
        if not self._is_open:
            self._num_failures = 0
            self.is_untroubled = True

    def answers(self, ticket: Ticket) -> None:
        """Register that a good response has begun. This closes it, since the whole response may take long."""
        if self._is_open and ticket.epoch == self._epoch:
            self._is_open = self._is_probing = False
            self._num_failures = 0
            self.is_untroubled = True
            self._seconds = self._first_seconds

    def failed(self, ticket: Ticket, now: float) -> None:
        if ticket.epoch != self._epoch:
            return
        if not self._is_open:
            self.is_untroubled = False
            self._num_failures += 1
            if self._num_failures >= self._max_failures:
                self._open(now)
        elif ticket.is_probe:
            self._seconds = min(2 * self._seconds, self._max_seconds)
            self._open(now)

    def abandoned(self, ticket: Ticket) -> None:
        """Register an end that shows nothing about the upstream. After a probe, the next request is the probe."""
        if ticket.is_probe and ticket.epoch == self._epoch:
            self._is_probing = False

    def _open(self, now: float) -> None:
        self._epoch += 1
        self.ticket = Ticket(self._epoch, is_probe=False)
        self._is_open = True
        self._is_probing = False
        self._until = now + self._seconds

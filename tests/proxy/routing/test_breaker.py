"""When an upstream is left alone, for how long, and what brings it back."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from brlite.proxy.routing.breaker import Breaker, Ticket

SECONDS = 10.0


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(failures=3, seconds=SECONDS, max_seconds=35.0)


def fail(breaker: Breaker, now: float, times: int = 1) -> None:
    for _ in range(times):
        breaker.failed(breaker.begin(now), now)


def succeed(breaker: Breaker, now: float) -> None:
    breaker.succeeded(breaker.begin(now))


def reopening_time(breaker: Breaker, now: float) -> float:
    """How long after `now` a request is allowed again."""
    return next(seconds / 10 for seconds in range(2000) if breaker.allows(now + seconds / 10))


def test_a_probe_that_is_being_answered_closes_it_however_long_that_takes(breaker: Breaker) -> None:
    fail(breaker, now=0.0, times=3)
    probe = breaker.begin(SECONDS)

    breaker.answers(probe)

    assert breaker.allows(SECONDS)
    assert breaker.state(SECONDS) == "closed"
    breaker.succeeded(probe)  # hours later
    fail(breaker, now=SECONDS, times=2)
    assert breaker.state(SECONDS) == "closed"


def test_answers_to_requests_from_before_it_opened_do_not_close_it(breaker: Breaker) -> None:
    earlier = breaker.begin(0.0)
    fail(breaker, now=0.0, times=3)

    breaker.answers(earlier)
    breaker.succeeded(earlier)

    assert breaker.state(0.0) == "open"


def test_failures_in_a_row_open_it(breaker: Breaker) -> None:
    fail(breaker, now=0.0, times=2)
    before = breaker.state(0.0)

    fail(breaker, now=0.0)

    assert (before, breaker.state(0.0), breaker.allows(0.0)) == ("closed", "open", False)


def test_a_success_between_failures_keeps_it_closed(breaker: Breaker) -> None:
    for _ in range(5):
        fail(breaker, now=0.0, times=2)
        succeed(breaker, now=0.0)

    assert breaker.state(0.0) == "closed"


def test_after_its_time_one_request_is_let_through(breaker: Breaker) -> None:
    fail(breaker, now=0.0, times=3)
    state = breaker.state(SECONDS)
    is_first_allowed = breaker.allows(SECONDS)

    breaker.begin(SECONDS)

    assert (state, is_first_allowed, breaker.allows(SECONDS + 100)) == ("half_open", True, False)
    assert breaker.state(SECONDS + 100) == "half_open"


def test_a_probe_that_succeeds_closes_it_and_forgets(breaker: Breaker) -> None:
    fail(breaker, now=0.0, times=3)
    fail(breaker, now=SECONDS)

    succeed(breaker, now=30.0)
    fail(breaker, now=40.0, times=2)
    is_closed = breaker.state(40.0) == "closed"
    fail(breaker, now=40.0)

    assert is_closed
    assert reopening_time(breaker, 40.0) == SECONDS


def test_each_probe_that_fails_doubles_the_time_up_to_the_longest(breaker: Breaker) -> None:
    fail(breaker, now=0.0, times=3)

    times = []
    for now in (100.0, 200.0, 300.0):
        fail(breaker, now)
        times.append(reopening_time(breaker, now))

    assert times == [20.0, 35.0, 35.0]


def test_a_first_time_beyond_the_longest_is_kept() -> None:
    breaker = Breaker(failures=1, seconds=150.0, max_seconds=120.0)
    fail(breaker, now=0.0)

    fail(breaker, now=150.0)

    assert reopening_time(breaker, 150.0) == 150.0


def test_a_client_that_leaves_counts_as_nothing(breaker: Breaker) -> None:
    fail(breaker, now=0.0, times=2)

    breaker.abandoned(breaker.begin(0.0))
    fail(breaker, now=0.0)

    assert breaker.state(0.0) == "open"


def test_a_client_that_leaves_the_probe_gives_its_place_back(breaker: Breaker) -> None:
    fail(breaker, now=0.0, times=3)
    probe = breaker.begin(SECONDS)

    breaker.abandoned(probe)

    assert breaker.allows(SECONDS)
    fail(breaker, now=SECONDS)
    assert reopening_time(breaker, SECONDS) == 20.0


def test_late_outcomes_change_nothing_while_it_is_open_or_when_it_has_closed_again(breaker: Breaker) -> None:
    tickets = [breaker.begin(0.0) for _ in range(9)]
    for ticket in tickets[:3]:
        breaker.failed(ticket, 1.0)

    breaker.failed(tickets[3], 5.0)
    breaker.succeeded(tickets[4])
    breaker.abandoned(tickets[5])
    is_open = breaker.state(5.0) == "open"
    reopening = reopening_time(breaker, 1.0)
    succeed(breaker, now=12.0)
    for ticket in tickets[6:]:
        breaker.failed(ticket, 12.0)

    assert (is_open, reopening) == (True, SECONDS)
    assert breaker.state(12.0) == "closed"


def test_failures_beside_the_probe_do_not_double_the_time(breaker: Breaker) -> None:
    earlier = breaker.begin(0.0)
    fail(breaker, now=0.0, times=3)
    beside = breaker.begin(1.0)
    probe = breaker.begin(SECONDS)

    breaker.failed(earlier, SECONDS)
    breaker.failed(beside, SECONDS)
    is_probing = not breaker.allows(SECONDS)
    breaker.failed(probe, SECONDS)

    assert is_probing
    assert reopening_time(breaker, SECONDS) == 20.0


def test_a_success_while_it_is_open_closes_it(breaker: Breaker) -> None:
    fail(breaker, now=0.0, times=3)
    fail(breaker, now=SECONDS)

    succeed(breaker, now=SECONDS + 1)  # sent for want of a better upstream

    assert breaker.state(SECONDS + 1) == "closed"
    fail(breaker, now=20.0, times=3)
    assert reopening_time(breaker, 20.0) == SECONDS


class BreakerMachine(RuleBasedStateMachine):
    """Requests begin and end in any order: it never stays shut once the time is over and nothing is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(failures=2, seconds=10.0, max_seconds=40.0)
        self.now = 0.0
        self.running: list[Ticket] = []

    @rule(seconds=st.sampled_from([0.0, 1.0, 10.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begin(self) -> None:
        self.running.append(self.breaker.begin(self.now))

    @precondition(lambda self: self.running)
    @rule(outcome=st.sampled_from(["succeeded", "failed", "abandoned"]), data=st.data())
    def end(self, outcome: str, data: st.DataObject) -> None:
        ticket = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if outcome == "failed":
            self.breaker.failed(ticket, self.now)
        else:
            getattr(self.breaker, outcome)(ticket)

    @invariant()
    def is_consistent(self) -> None:
        state = self.breaker.state(self.now)
        assert self.breaker.allows(self.now) <= (state != "open")
        assert self.breaker.allows(self.now) or state != "closed"

    @precondition(lambda self: not self.running)
    @invariant()
    def is_never_shut_for_ever(self) -> None:
        assert self.breaker.allows(self.now + 40.0)


TestBreakerMachine = BreakerMachine.TestCase

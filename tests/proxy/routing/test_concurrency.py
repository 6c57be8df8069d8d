"""How many requests of a model run, how many wait, and in which order they get their turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brlite.errors import QueueFull
from brlite.proxy.routing.concurrency import ConcurrencyLimit, Waiting

KEY = "key"


def no_turn() -> None:
    raise AssertionError("it was nobody's turn")


def not_dropped(error: QueueFull) -> None:
    raise AssertionError("nobody had to leave")


def queue_up(limit: ConcurrencyLimit, on_turn: Callable[[], None], key: str = KEY) -> Waiting:
    return limit.wait(key, on_turn, not_dropped)


def full_limit(max_in_flight: int = 1, max_queued: int = 10) -> ConcurrencyLimit:
    limit = ConcurrencyLimit(max_in_flight, max_queued)
    while limit.acquire(KEY):
        pass
    return limit


def test_places_are_taken_until_there_are_none() -> None:
    limit = ConcurrencyLimit(max_in_flight=2, max_queued=0)

    taken = [limit.acquire(KEY) for _ in range(3)]

    assert taken == [True, True, False]
    assert limit.num_in_flight == 2


def test_a_place_given_back_can_be_taken_again() -> None:
    limit = full_limit()

    limit.release(KEY)

    assert limit.num_in_flight == 0
    assert limit.acquire(KEY)


def test_a_place_given_back_goes_to_whoever_has_waited_longest() -> None:
    limit = full_limit()
    turns: list[str] = []
    queue_up(limit, lambda: turns.append("first"))
    queue_up(limit, lambda: turns.append("second"))

    limit.release(KEY)

    assert turns == ["first"]
    assert (limit.num_in_flight, limit.num_waiting) == (1, 1)
    assert not limit.acquire(KEY)


def test_a_full_queue_is_said_with_its_limit_and_when_to_come_back() -> None:
    limit = full_limit(max_in_flight=3, max_queued=2)
    queue_up(limit, no_turn)
    queue_up(limit, no_turn)

    with pytest.raises(QueueFull, match="3 requests running and 2 waiting") as caught:
        queue_up(limit, no_turn)

    assert caught.value.retry_after_seconds
    assert limit.num_waiting == 2


def test_without_a_queue_nobody_waits() -> None:
    limit = full_limit(max_queued=0)

    with pytest.raises(QueueFull):
        queue_up(limit, no_turn)

    assert limit.num_waiting == 0


def test_whoever_leaves_is_passed_over_and_makes_room_in_the_queue() -> None:
    limit = full_limit(max_queued=1)
    turns: list[str] = []
    impatient = queue_up(limit, no_turn)

    impatient.leave()
    impatient.leave()
    queue_up(limit, lambda: turns.append("patient"))
    limit.release(KEY)

    assert turns == ["patient"]


def test_leaving_after_the_turn_came_leaves_the_place_with_its_holder() -> None:
    limit = full_limit()
    turns: list[str] = []
    waiting = queue_up(limit, lambda: turns.append("only"))
    limit.release(KEY)

    waiting.leave()

    assert turns == ["only"]
    assert limit.num_in_flight == 1


def test_those_who_leave_are_not_kept_behind_a_long_request() -> None:
    limit = full_limit()

    for _ in range(1000):
        queue_up(limit, no_turn).leave()

    assert limit.num_waiting == 0
    limit.release(KEY)
    assert limit.num_in_flight == 0


def test_any_number_may_give_their_place_back_as_soon_as_they_get_it() -> None:
    limit = full_limit(max_queued=5000)
    num_turns = 0

    def come_and_go() -> None:
        nonlocal num_turns
        num_turns += 1
        limit.release(KEY)

    for _ in range(5000):
        queue_up(limit, come_and_go)

    limit.release(KEY)

    assert num_turns == 5000
    assert (limit.num_in_flight, limit.num_waiting) == (0, 0)


def test_a_place_that_comes_back_after_the_last_has_left_is_free() -> None:
    limit = full_limit()

    def come() -> None:
        limit.release(KEY)
        last.leave()

    queue_up(limit, come)
    last = queue_up(limit, no_turn)

    limit.release(KEY)

    assert (limit.num_in_flight, limit.num_waiting) == (0, 0)


def test_a_place_goes_to_the_key_that_runs_least_then_in_turn() -> None:
    limit = ConcurrencyLimit(max_in_flight=3, max_queued=10)
    assert all(limit.acquire("a") for _ in range(3))
    turns: list[str] = []
    for key in "aaabbc":
        queue_up(limit, lambda key=key: turns.append(key), key)  # type: ignore[misc]

    for _ in range(3):
        limit.release("a")

    assert turns == ["b", "c", "a"]  # one each
    limit.release("c")
    assert turns[3:] == ["b"]  # a and b run one each; a was served last


def test_one_keys_backlog_does_not_shut_another_key_out() -> None:
    limit = full_limit(max_in_flight=2, max_queued=3)
    dropped: list[QueueFull] = []
    for _ in range(3):
        limit.wait(KEY, no_turn, dropped.append)
    turns: list[str] = []

    limit.wait("other", lambda: turns.append("other"), not_dropped)
    limit.release(KEY)

    assert turns == ["other"]
    assert [error.retry_after_seconds for error in dropped] == [5]
    assert limit.num_waiting == 2


class PlacesMachine(RuleBasedStateMachine):
    """Against a list of who runs and a list of who waits."""

    @initialize(max_in_flight=st.integers(1, 3), max_queued=st.integers(0, 4))
    def start(self, max_in_flight: int, max_queued: int) -> None:
        self.max_in_flight, self.max_queued = max_in_flight, max_queued
        self.limit = ConcurrencyLimit(max_in_flight, max_queued)
        self.num_asked = 0
        self.keys: dict[int, str] = {}
        self.running: list[int] = []
        self.waiting: list[int] = []
        self.turns: dict[int, Waiting] = {}

    @rule(key=st.sampled_from("abc"))
    def ask(self, key: str) -> None:
        self.num_asked += 1
        request = self.num_asked
        self.keys[request] = key
        if self.limit.acquire(key):
            assert not self.waiting
            self.running.append(request)
            return
        try:
            self.turns[request] = self.limit.wait(key, lambda: self.come(request), lambda _: self.drop(request))
        except QueueFull:
            assert len(self.waiting) == self.max_queued
        else:
            self.waiting.append(request)

    def drop(self, request: int) -> None:
        """Its key has most of those that wait."""
        counts = Counter(self.keys[each] for each in self.waiting)
        assert counts[self.keys[request]] == max(counts.values()) > 1
        self.waiting.remove(request)

    def come(self, request: int) -> None:
        """It is its key's first, and no key that waits runs fewer."""
        key = self.keys[request]
        assert request == next(each for each in self.waiting if self.keys[each] == key)
        running = Counter(self.keys[each] for each in self.running)
        assert running[key] == min(running[self.keys[each]] for each in self.waiting)
        self.waiting.remove(request)
        self.running.append(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        self.limit.release(self.keys[request])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(request)
        self.turns[request].leave()

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def leave_once_more(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.turns)))
        if request not in self.waiting:
            self.turns[request].leave()

    @invariant()
    def nobody_is_lost_and_nobody_is_too_many(self) -> None:
        if not hasattr(self, "limit"):
            return
        assert self.limit.num_in_flight == len(self.running) <= self.max_in_flight
        assert self.limit.num_waiting == len(self.waiting) <= self.max_queued
        assert not self.waiting or len(self.running) == self.max_in_flight


TestPlacesMachine = PlacesMachine.TestCase


def test_places_are_shared_in_proportion_to_weights() -> None:
    limit = ConcurrencyLimit(4, 100)
    assert all(limit.acquire("first") for _ in range(4))
    turns: list[str] = []
    for _ in range(10):
        limit.wait("heavy", lambda: turns.append("heavy"), not_dropped, weight=3)
        limit.wait("light", lambda: turns.append("light"), not_dropped)

    for _ in range(4):
        limit.release("first")

    assert sorted(turns) == ["heavy", "heavy", "heavy", "light"]

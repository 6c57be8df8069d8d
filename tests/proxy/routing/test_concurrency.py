"""How many requests of a model run, how many wait, and in which order they get their turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brlite.errors import QueueFull
from brlite.proxy.routing.concurrency import ConcurrencyLimit, Waiter, Waiting

KEY = "key"


def no_turn() -> None:
    raise AssertionError("it was nobody's turn")


def not_dropped(error: QueueFull) -> None:
    raise AssertionError("nobody had to leave")


def queue_up(places: ConcurrencyLimit, on_turn: Callable[[], None], key: str = KEY) -> Waiting:
    return places.wait(key, Waiter(on_turn, not_dropped))


def full_places(max_in_flight: int = 1, max_queued: int = 10) -> ConcurrencyLimit:
    places = ConcurrencyLimit(max_in_flight, max_queued)
    while places.take(KEY):
        pass
    return places


def test_places_are_taken_until_there_are_none() -> None:
    places = ConcurrencyLimit(max_in_flight=2, max_queued=0)

    taken = [places.take(KEY) for _ in range(3)]

    assert taken == [True, True, False]
    assert places.num_in_flight == 2


def test_a_place_given_back_can_be_taken_again() -> None:
    places = full_places()

    places.give_back(KEY)

    assert places.num_in_flight == 0
    assert places.take(KEY)


def test_a_place_given_back_goes_to_whoever_has_waited_longest() -> None:
    places = full_places()
    turns: list[str] = []
    first = queue_up(places, lambda: turns.append("first"))
    second = queue_up(places, lambda: turns.append("second"))

    places.give_back(KEY)

    assert turns == ["first"]
    assert (first.has_turn, second.has_turn) == (True, False)
    assert (places.num_in_flight, places.num_waiting) == (1, 1)
    assert not places.take(KEY)


def test_a_full_queue_is_said_with_its_limit_and_when_to_come_back() -> None:
    places = full_places(max_in_flight=3, max_queued=2)
    queue_up(places, no_turn)
    queue_up(places, no_turn)

    with pytest.raises(QueueFull, match="3 requests running and 2 waiting") as caught:
        queue_up(places, no_turn)

    assert caught.value.retry_after_seconds
    assert places.num_waiting == 2


def test_without_a_queue_nobody_waits() -> None:
    places = full_places(max_queued=0)

    with pytest.raises(QueueFull):
        queue_up(places, no_turn)

    assert places.num_waiting == 0


def test_whoever_leaves_is_passed_over_and_makes_room_in_the_queue() -> None:
    places = full_places(max_queued=1)
    turns: list[str] = []
    impatient = queue_up(places, no_turn)

    impatient.leave()
    impatient.leave()
    queue_up(places, lambda: turns.append("patient"))
    places.give_back(KEY)

    assert turns == ["patient"]
    assert not impatient.has_turn


def test_leaving_after_the_turn_came_leaves_the_place_with_its_holder() -> None:
    places = full_places()
    waiting = queue_up(places, lambda: None)
    places.give_back(KEY)

    waiting.leave()

    assert waiting.has_turn
    assert places.num_in_flight == 1


def test_those_who_leave_are_not_kept_behind_a_long_request() -> None:
    places = full_places()

    for _ in range(1000):
        queue_up(places, no_turn).leave()

    assert places.num_waiting == 0
    places.give_back(KEY)
    assert places.num_in_flight == 0


def test_any_number_may_give_their_place_back_as_soon_as_they_get_it() -> None:
    places = full_places(max_queued=5000)
    num_turns = 0

    def come_and_go() -> None:
        nonlocal num_turns
        num_turns += 1
        places.give_back(KEY)

    for _ in range(5000):
        queue_up(places, come_and_go)

    places.give_back(KEY)

    assert num_turns == 5000
    assert (places.num_in_flight, places.num_waiting) == (0, 0)


def test_a_place_that_comes_back_after_the_last_has_left_is_free() -> None:
    places = full_places()

    def come() -> None:
        places.give_back(KEY)
        last.leave()

    queue_up(places, come)
    last = queue_up(places, no_turn)

    places.give_back(KEY)

    assert (places.num_in_flight, places.num_waiting) == (0, 0)


def test_a_place_goes_to_the_key_that_runs_least_then_in_turn() -> None:
    places = ConcurrencyLimit(max_in_flight=3, max_queued=10)
    assert all(places.take("a") for _ in range(3))
    turns: list[str] = []
    for key in "aaabbc":
        queue_up(places, lambda key=key: turns.append(key), key)  # type: ignore[misc]

    for _ in range(3):
        places.give_back("a")

    assert turns == ["b", "c", "a"]  # one each
    places.give_back("c")
    assert turns[3:] == ["b"]  # a and b run one each; a was served last


def test_one_keys_backlog_does_not_shut_another_key_out() -> None:
    places = full_places(max_in_flight=2, max_queued=3)
    dropped: list[QueueFull] = []
    for _ in range(3):
        places.wait(KEY, Waiter(no_turn, dropped.append))
    turns: list[str] = []

    places.wait("other", Waiter(lambda: turns.append("other"), not_dropped))
    places.give_back(KEY)

    assert turns == ["other"]
    assert [error.retry_after_seconds for error in dropped] == [5]
    assert places.num_waiting == 2


class PlacesMachine(RuleBasedStateMachine):
    """Against a list of who runs and a list of who waits."""

    @initialize(max_in_flight=st.integers(1, 3), max_queued=st.integers(0, 4))
    def start(self, max_in_flight: int, max_queued: int) -> None:
        self.max_in_flight, self.max_queued = max_in_flight, max_queued
        self.places = ConcurrencyLimit(max_in_flight, max_queued)
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
        if self.places.take(key):
            assert not self.waiting
            self.running.append(request)
            return
        try:
            self.turns[request] = self.places.wait(
                key, Waiter(lambda: self.come(request), lambda _: self.drop(request))
            )
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
        self.places.give_back(self.keys[request])

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
        if not hasattr(self, "places"):
            return
        assert self.places.num_in_flight == len(self.running) <= self.max_in_flight
        assert self.places.num_waiting == len(self.waiting) <= self.max_queued
        assert not self.waiting or len(self.running) == self.max_in_flight


TestPlacesMachine = PlacesMachine.TestCase

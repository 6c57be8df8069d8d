"""How many requests of a model run, how many wait, and in which order they get their turn."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brlite.errors import QueueFull
from brlite.proxy.places import Places, Waiting


def no_turn() -> None:
    raise AssertionError("it was nobody's turn")


def full_places(max_in_flight: int = 1, max_queued: int = 10) -> Places:
    places = Places(max_in_flight, max_queued)
    while places.take():
        pass
    return places


def test_places_are_taken_until_there_are_none() -> None:
    places = Places(max_in_flight=2, max_queued=0)

    taken = [places.take() for _ in range(3)]

    assert taken == [True, True, False]
    assert places.num_in_flight == 2


def test_a_place_given_back_can_be_taken_again() -> None:
    places = full_places()

    places.give_back()

    assert places.num_in_flight == 0
    assert places.take()


def test_a_place_given_back_goes_to_whoever_has_waited_longest() -> None:
    places = full_places()
    turns: list[str] = []
    first = places.wait(lambda: turns.append("first"))
    second = places.wait(lambda: turns.append("second"))

    places.give_back()

    assert turns == ["first"]
    assert (first.has_turn, second.has_turn) == (True, False)
    assert (places.num_in_flight, places.num_waiting) == (1, 1)
    assert not places.take()


def test_a_full_queue_is_said_with_its_limit_and_when_to_come_back() -> None:
    places = full_places(max_in_flight=3, max_queued=2)
    places.wait(no_turn)
    places.wait(no_turn)

    with pytest.raises(QueueFull, match="3 requests running and 2 waiting") as caught:
        places.wait(no_turn)

    assert caught.value.retry_after_seconds
    assert places.num_waiting == 2


def test_without_a_queue_nobody_waits() -> None:
    places = full_places(max_queued=0)

    with pytest.raises(QueueFull):
        places.wait(no_turn)

    assert places.num_waiting == 0


def test_whoever_leaves_is_passed_over_and_makes_room_in_the_queue() -> None:
    places = full_places(max_queued=1)
    turns: list[str] = []
    impatient = places.wait(no_turn)

    impatient.leave()
    impatient.leave()
    places.wait(lambda: turns.append("patient"))
    places.give_back()

    assert turns == ["patient"]
    assert not impatient.has_turn


def test_leaving_after_the_turn_came_leaves_the_place_with_its_holder() -> None:
    places = full_places()
    waiting = places.wait(lambda: None)
    places.give_back()

    waiting.leave()

    assert waiting.has_turn
    assert places.num_in_flight == 1


def test_those_who_leave_are_not_kept_behind_a_long_request() -> None:
    places = full_places()

    for _ in range(1000):
        places.wait(no_turn).leave()

    assert places.num_waiting == 0
    places.give_back()
    assert places.num_in_flight == 0


def test_any_number_may_give_their_place_back_as_soon_as_they_get_it() -> None:
    places = full_places(max_queued=5000)
    num_turns = 0

    def come_and_go() -> None:
        nonlocal num_turns
        num_turns += 1
        places.give_back()

    for _ in range(5000):
        places.wait(come_and_go)

    places.give_back()

    assert num_turns == 5000
    assert (places.num_in_flight, places.num_waiting) == (0, 0)


def test_a_place_that_comes_back_after_the_last_has_left_is_free() -> None:
    places = full_places()

    def come() -> None:
        places.give_back()
        last.leave()

    places.wait(come)
    last = places.wait(no_turn)

    places.give_back()

    assert (places.num_in_flight, places.num_waiting) == (0, 0)


class PlacesMachine(RuleBasedStateMachine):
    """Against a list of who runs and a list of who waits."""

    @initialize(max_in_flight=st.integers(1, 3), max_queued=st.integers(0, 3))
    def start(self, max_in_flight: int, max_queued: int) -> None:
        self.max_in_flight, self.max_queued = max_in_flight, max_queued
        self.places = Places(max_in_flight, max_queued)
        self.num_asked = 0
        self.running: list[int] = []
        self.waiting: deque[int] = deque()
        self.turns: dict[int, Waiting] = {}

    @rule()
    def ask(self) -> None:
        self.num_asked += 1
        request = self.num_asked
        if self.places.take():
            assert not self.waiting
            self.running.append(request)
            return
        try:
            self.turns[request] = self.places.wait(lambda: self.come(request))
        except QueueFull:
            assert len(self.waiting) == self.max_queued
        else:
            self.waiting.append(request)

    def come(self, request: int) -> None:
        assert request == self.waiting.popleft()
        self.running.append(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.running.remove(data.draw(st.sampled_from(self.running)))
        self.places.give_back()

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

"""How keys share a bounded queue: turns in rotation, and room for a key that comes late."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brlite.http.fair_queue import FairQueue


def filled(max_items: int, text: str) -> FairQueue[str, str]:
    """A queue with an item for each word, whose first letter is its key."""
    queue: FairQueue[str, str] = FairQueue(max_items)
    for item in text.split():
        assert queue.add(item[0], item) is None
    return queue


def drained(queue: FairQueue[str, str]) -> str:
    return " ".join(queue.pop() for _ in range(len(queue)))


def test_one_key_is_served_first_come_first_served() -> None:
    assert drained(filled(10, "a1 a2 a3")) == "a1 a2 a3"


def test_keys_take_turns_however_many_items_one_has() -> None:
    assert drained(filled(10, "a1 a2 a3 a4 b1 c1 c2")) == "a1 b1 c1 a2 c2 a3 a4"


def test_a_key_that_was_served_waits_for_the_others() -> None:
    queue = filled(10, "a1 b1 b2")

    served = [queue.pop()]
    queue.add("a", "a2")
    served += [queue.pop(), queue.pop(), queue.pop()]

    assert served == ["a1", "b1", "a2", "b2"]


def test_a_full_queue_refuses_the_key_that_fills_it() -> None:
    queue = filled(3, "a1 a2 a3")

    assert queue.add("a", "a4") == "a4"
    assert drained(queue) == "a1 a2 a3"


def test_a_full_queue_has_room_for_another_key_at_the_cost_of_the_longest_ones_newest() -> None:
    queue = filled(4, "a1 a2 a3 b1")

    dropped = [queue.add("c", "c1"), queue.add("c", "c2")]

    assert dropped == ["a3", "c2"]
    assert drained(queue) == "a1 b1 c1 a2"


def test_keys_with_as_many_items_do_not_drive_each_other_out() -> None:
    queue = filled(4, "a1 a2 b1 b2")

    assert queue.add("b", "b3") == "b3"
    assert queue.add("c", "c1") == "a2"
    assert queue.add("c", "c2") == "c2"


def test_a_queue_without_room_takes_nothing() -> None:
    assert FairQueue[str, str](0).add("a", "a1") == "a1"


def test_items_that_leave_are_gone_at_once() -> None:
    queue = filled(3, "a1 a2 b1")

    assert queue.remove("a", "a1")
    assert not queue.remove("a", "a1")
    assert not queue.remove("z", "z1")

    assert (len(queue), queue.count("a"), list(queue.keys)) == (2, 1, ["a", "b"])
    assert drained(queue) == "a2 b1"


def test_an_empty_queue_has_nothing_to_give() -> None:
    with pytest.raises(LookupError):
        FairQueue[str, str](3).pop()


class FairQueueMachine(RuleBasedStateMachine):
    """Against a plain list of who waits."""

    @initialize(max_items=st.integers(0, 6))
    def start(self, max_items: int) -> None:
        self.queue: FairQueue[str, int] = FairQueue(max_items)
        self.waiting: list[tuple[str, int]] = []
        self.num_added = 0

    def counts(self) -> dict[str, int]:
        keys = [key for key, _ in self.waiting]
        return {key: keys.count(key) for key in keys}

    @rule(key=st.sampled_from("abc"))
    def add(self, key: str) -> None:
        self.num_added += 1
        before = self.counts()
        dropped = self.queue.add(key, self.num_added)
        self.waiting.append((key, self.num_added))
        if dropped is None:
            assert len(self.waiting) <= self.queue.max_items
            return
        assert sum(before.values()) == self.queue.max_items
        owner = next(key for key, item in self.waiting if item == dropped)
        assert owner == key or before[owner] == max(before.values()) > before.get(key, 0) + 1
        assert dropped == max(item for key, item in self.waiting if key == owner)
        self.waiting.remove((owner, dropped))

    @precondition(lambda self: self.waiting)
    @rule()
    def pop(self) -> None:
        item = self.queue.pop()
        key = next(key for key, each in self.waiting if each == item)
        assert item == min(each for owner, each in self.waiting if owner == key)
        self.waiting.remove((key, item))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(entry)
        assert self.queue.remove(*entry)

    @invariant()
    def it_holds_what_waits(self) -> None:
        if hasattr(self, "queue"):
            assert len(self.queue) == len(self.waiting)
            assert {key: self.queue.count(key) for key in self.queue.keys} == self.counts()


TestFairQueueMachine = FairQueueMachine.TestCase

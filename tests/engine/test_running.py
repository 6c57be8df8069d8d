"""Which sequence loses its place: quickly among many running ones, and the same as without an index."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from brlite.config.options import LimitsConfig
from tests.engine.conftest import Driver, next_to_replace

NUM_SEQS = 4000
# The tenant and the group of each request, by its number; the second for those that wait.
MANY: dict[str, tuple[Callable[[int], tuple[str, str]], Callable[[int], tuple[str, str]]]] = {
    "one tenant": (lambda number: ("", f"{number}"), lambda number: ("", f"new {number}")),
    "ten tenants": (lambda number: (f"{number % 10}", f"{number}"), lambda number: (f"{number % 10}", f"new {number}")),
    "a tenant each": (lambda number: (f"{number}", ""), lambda number: (f"new {number}", "")),
}


@pytest.mark.parametrize("kind", MANY)
def test_choosing_among_4000_running_sequences_takes_microseconds(kind: str) -> None:
    limits = LimitsConfig(max_waiting=NUM_SEQS)
    driver = Driver(budget=NUM_SEQS, max_num_seqs=NUM_SEQS, num_blocks=2 * NUM_SEQS, limits=limits)
    for of_round in MANY[kind]:
        for number in range(NUM_SEQS):
            tenant, group = of_round(number)
            driver.submit([7], tenant=tenant, group=group)
        driver.begin()
    scheduler = driver.engine._scheduler
    assert (len(scheduler.running), scheduler.waiting.num_waiting) == (NUM_SEQS, NUM_SEQS)
    began = time.process_time()

    for _ in range(100):
        assert scheduler._next_to_replace() is None

    assert time.process_time() < began + 0.15  # grouping all of them anew took 5 to 8 ms, these 100 a second


@pytest.mark.parametrize("seed", range(20))
def test_places_go_from_who_has_most_of_them(seed: int) -> None:
    """`Driver.step` compares with the slow way; so does the machine of all events."""
    chance = random.Random(seed)
    driver = Driver(budget=32, max_num_seqs=6, num_blocks=chance.choice([12, 40]), limits=LimitsConfig(max_waiting=99))
    num_chosen = 0
    for _ in range(60):
        for _ in range(chance.choice([0, 0, 1, 3])):
            driver.submit(
                [chance.randrange(9) for _ in range(chance.randrange(1, 9))],
                tenant=chance.choice("abc"),
                group=chance.choice("xyz"),
                priority=chance.choice([0, 0, 1, 2]),
                n=chance.choice([1, 1, 3]),
                max_tokens=chance.randrange(1, 9),
                temperature=1.0,
            )
        driver.step()
        num_chosen += next_to_replace(driver.engine._scheduler) is not None
        if chance.random() < 0.2:
            driver.engine._scheduler.promote(driver.now - 3)

    assert num_chosen

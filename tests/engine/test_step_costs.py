"""What steps cost is measured: by their rows, and between two of them."""

from __future__ import annotations

from random import Random

import pytest

from brlite.engine.backend import CARD_ROWS, CPU_ROWS, RowCosts
from brlite.engine.step_costs import EXPIRY_STEPS, INITIAL_WAIT_COST, MAX_ROWS, StepCosts, WaitCost


def steep(num_rows: int) -> float:
    """With jumps, and dearer than expected."""
    return 1.0 + 0.3 * (num_rows - 1) + 0.5 * (num_rows > 6)


@pytest.fixture
def measured() -> StepCosts:
    """What is known after many steps on a machine whose rows have `steep` costs."""
    times = StepCosts(CPU_ROWS)
    for _ in range(300):
        for num_rows in (1, 2, 6, 8):
            times.observe(num_rows, 0.010 * steep(num_rows), has_drafts=num_rows > 1)
    return times


def test_the_cost_of_rows_is_measured(measured: StepCosts) -> None:
    for num_rows in (2, 6, 8):
        assert measured.cost(num_rows) == pytest.approx(steep(num_rows), rel=0.02)
    measured.observe(2, 60.0, has_drafts=True)  # the machine slept

    assert measured.cost(2) < 1.1 * steep(2)


def test_costs_between_measured_ones_are_interpolated_and_those_above_grow_as_fast(measured: StepCosts) -> None:
    assert measured.cost(7) == pytest.approx((measured.cost(6) + measured.cost(8)) / 2)
    assert [measured.cost(num_rows) > 1.5 * CPU_ROWS.cost(num_rows) for num_rows in (9, MAX_ROWS, 2 * MAX_ROWS)] == [
        True
    ] * 3
    assert 0.9 * steep(MAX_ROWS) < measured.cost(MAX_ROWS) < 1.5 * steep(MAX_ROWS)


def test_few_steps_show_that_rows_are_dear() -> None:
    times = StepCosts(CPU_ROWS)

    for _ in range(4):
        times.observe(1, 0.010, has_drafts=False)
        times.observe(8, 0.035, has_drafts=True)

    assert times.cost(8) > 3.0


def test_outliers_hardly_move_the_cost_of_rows(measured: StepCosts) -> None:
    for number in range(300):
        for num_rows in (1, 4):
            factor = 2.0 if number % 10 == num_rows else 1.0
            measured.observe(num_rows, 0.010 * steep(num_rows) * factor, has_drafts=num_rows > 1)

    assert measured.cost(4) / measured.cost(1) == pytest.approx(steep(4), rel=0.04)


@pytest.mark.parametrize("num_plain_rows", [1, 4])
@pytest.mark.parametrize("slower", [1.05, 1.5, 2.0])
def test_many_steps_without_drafts_leave_the_costs_of_drafts_as_they_are(num_plain_rows: int, slower: float) -> None:
    """One step of twenty takes longer. That must not make the others' rows seem cheap."""
    costs, chance = StepCosts(CPU_ROWS), Random(1)
    rows = (num_plain_rows, num_plain_rows + 1, num_plain_rows + 4)

    def observe(num_rows: int) -> None:
        factor = chance.gauss(1.0, 0.03) * (slower if chance.random() < 0.05 else 1.0)
        costs.observe(num_rows, 0.010 * steep(num_rows) * factor, has_drafts=num_rows > num_plain_rows)

    for _ in range(300):
        for num_rows in rows:
            observe(num_rows)
    for _ in range(EXPIRY_STEPS - 1000):
        observe(num_plain_rows)

    for num_rows in rows:
        expected = steep(num_rows) / steep(num_plain_rows)
        assert costs.cost(num_rows) / costs.cost(num_plain_rows) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_cost_of_rows_does_not_change_with_the_speed_of_the_machine(measured: StepCosts, factor: float) -> None:
    for _ in range(2000):
        measured.observe(1, 0.010 * factor, has_drafts=False)

    assert measured.cost(8) / measured.cost(1) == pytest.approx(steep(8), rel=0.04)
    measured.observe(8, 0.010 * factor * steep(8), has_drafts=True)
    assert measured.cost(8) / measured.cost(1) == pytest.approx(steep(8), rel=0.04)


def test_costs_that_were_compared_badly_are_corrected_when_the_number_of_streams_changes() -> None:
    """The machine becomes faster just as the number of streams changes, so four rows seem as cheap as one."""
    costs = StepCosts(CPU_ROWS)
    for _ in range(1000):
        costs.observe(1, 0.010 * steep(4), has_drafts=False)
    for _ in range(1000):
        costs.observe(4, 0.010 * steep(4), has_drafts=False)
    assert costs.cost(4) / costs.cost(1) < 0.9 * steep(4)

    for _ in range(20):
        for num_rows in (1, 4):
            for _ in range(100):
                costs.observe(num_rows, 0.010 * steep(num_rows), has_drafts=False)

    assert costs.cost(4) / costs.cost(1) == pytest.approx(steep(4), rel=0.05)


def test_rows_may_be_expected_to_cost_nothing() -> None:
    costs = StepCosts(RowCosts(64, 0.0, 0.03))

    for num_rows in (1, 2):
        costs.observe(num_rows, 0.010, has_drafts=num_rows > 1)

    assert costs.cost(8) == pytest.approx(1.0)


def test_a_measured_cost_is_kept_until_it_expires(measured: StepCosts) -> None:
    for _ in range(EXPIRY_STEPS - 1):
        measured.observe(1, 0.010, has_drafts=False)
    assert measured.cost(8) == pytest.approx(steep(8), rel=0.02)

    measured.observe(1, 0.010, has_drafts=False)

    assert measured.cost(8) < 1.1 * CPU_ROWS.cost(8), "it may have been too high, and have ended drafts"


def test_the_wait_between_two_steps_is_measured_against_steps_that_were_launched_ahead() -> None:
    wait = WaitCost(CARD_ROWS)
    assert wait.cost == INITIAL_WAIT_COST
    for _ in range(60):
        wait.observe(1, 0.010, is_ahead=True)
        wait.observe(9, 0.010 * CARD_ROWS.cost(9) + 0.002, is_ahead=False)

    assert wait.cost == pytest.approx(0.2, abs=0.01)
    wait.observe(1, 60.0, is_ahead=False)  # the machine slept
    assert wait.cost < 0.7

"""How many threads steps take: judged by made-up times, without threads and clocks."""

from __future__ import annotations

from collections.abc import Callable

from brlite.backends.native.adaptive_threads import MAX_PAUSE_SECONDS, AdaptiveThreads

STEP_SECONDS = 0.02  # of computing, on one thread that has a core
Machine = Callable[[int], float]  # threads -> how many of them compute on average


def quiet(num_threads: int) -> float:
    return 0.9 * num_threads


def with_one_busy_core_of_two(num_threads: int) -> float:
    return 0.97 if num_threads == 1 else 0.3


def with_all_cores_busy(num_threads: int) -> float:
    return 0.6 if num_threads == 1 else 0.5


def with_five_busy_cores_of_eight(num_threads: int) -> float:
    return quiet(num_threads) if num_threads <= 3 else 1.2


def run(threads: AdaptiveThreads, machine: Machine, seconds: float) -> list[int]:
    """Steps for so long; the numbers of threads that they took."""
    taken, elapsed = [], 0.0
    while elapsed < seconds:
        taken.append(threads.num_threads)
        average = machine(threads.num_threads)
        threads.observe(STEP_SECONDS / average, STEP_SECONDS)
        elapsed += STEP_SECONDS / average
    return taken


def test_all_threads_are_kept_where_nobody_else_computes() -> None:
    threads = AdaptiveThreads(2)

    assert set(run(threads, quiet, 10)) == {2}


def test_one_thread_is_taken_as_soon_as_a_neighbour_holds_up_the_other() -> None:
    threads = AdaptiveThreads(2)
    run(threads, quiet, 10)

    taken = run(threads, with_one_busy_core_of_two, 1)

    assert taken.index(1) <= 5
    assert threads.num_settled == 1


def test_more_threads_are_tried_ever_more_rarely_while_they_are_no_better() -> None:
    threads = AdaptiveThreads(2)
    run(threads, with_one_busy_core_of_two, 30)

    taken = run(threads, with_one_busy_core_of_two, 10 * MAX_PAUSE_SECONDS)

    assert 0 < taken.count(2) / len(taken) < 0.02
    assert threads.num_settled == 1


def test_all_threads_come_back_when_the_neighbour_has_gone() -> None:
    threads = AdaptiveThreads(2)
    run(threads, with_one_busy_core_of_two, 60)

    run(threads, quiet, 1.5 * MAX_PAUSE_SECONDS)

    assert threads.num_settled == threads.num_threads == 2


def test_fewer_threads_are_taken_only_if_they_are_faster() -> None:
    threads = AdaptiveThreads(2)

    taken = run(threads, lambda num_threads: 0.4 if num_threads == 1 else 0.9, 100)

    assert threads.num_settled == 2
    assert taken.count(1) / len(taken) < 0.05


def test_one_thread_is_taken_where_every_core_has_a_neighbour() -> None:
    threads = AdaptiveThreads(2)

    run(threads, with_all_cores_busy, 10)

    assert threads.num_settled == 1


def test_many_threads_become_fewer_until_all_have_cores() -> None:
    threads = AdaptiveThreads(8)

    run(threads, with_five_busy_cores_of_eight, 20)

    assert threads.num_settled == 2


def test_a_single_thread_stays_one() -> None:
    threads = AdaptiveThreads(1)

    assert set(run(threads, with_all_cores_busy, 5)) == {1}

"""Steps that hold no stream up: as much of a prompt as fits the time, by what the steps before took."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from brlite.engine.backend import Batch
from brlite.engine.pacing import MIN_CHUNK_TOKENS, StepPace
from tests.engine.conftest import Driver
from tests.fakes import reference_tokens

PER_TOKEN, PER_PAIR = 1e-3, 1e-6


def seconds(batch: Batch) -> float:
    """What a step takes on a machine that the model of `StepPace` describes exactly."""
    chunks = [(seq.start, len(seq.token_ids)) for seq in batch.seqs]
    return sum(PER_TOKEN * num + PER_PAIR * (start * num + num**2 / 2) for start, num in chunks)


@pytest.fixture
def make_long_driver(make_driver: Callable[..., Driver]) -> Callable[..., Driver]:
    def make(max_step_seconds: float, step_seconds: Callable[[Batch], float] = seconds) -> Driver:
        return make_driver(
            budget=256,
            engine={"max_step_seconds": max_step_seconds},
            step_seconds=step_seconds,
            max_model_len=8192,
            num_blocks=4096,
        )

    return make


def start_stream_and_prompt(driver: Driver) -> tuple[str, str, list[int]]:
    stream = driver.submit(list(b"x" * 64), max_tokens=400)
    for _ in range(3):
        driver.step()
    prompt = [random.Random(1).randrange(97, 122) for _ in range(6000)]
    return stream, driver.submit(prompt, max_tokens=4), prompt


def test_a_stream_waits_at_most_max_step_seconds_while_a_long_prompt_is_computed(
    make_long_driver: Callable[..., Driver],
) -> None:
    driver = make_long_driver(0.2)
    _, long, _ = start_stream_and_prompt(driver)

    batches: list[Batch] = []
    while long not in driver.outputs:
        batch = driver.step()
        assert batch is not None
        batches.append(batch)

    # The first chunks are too alike to tell attention from the matrices.
    assert max(map(seconds, batches[2:])) <= 0.2
    sizes = [max(len(seq.token_ids) for seq in batch.seqs) for batch in batches]
    assert sizes[2] > sizes[-2] >= MIN_CHUNK_TOKENS, "chunks get smaller as the prompt goes on"
    assert sum(map(seconds, batches[2:-1])) >= 0.14 * len(batches[2:-1]), "the time is used"


def test_most_steps_keep_the_bound_on_a_machine_whose_pace_varies(make_long_driver: Callable[..., Driver]) -> None:
    noise = random.Random(3)
    taken = list[float]()

    def varying(batch: Batch) -> float:
        taken.append(seconds(batch) * noise.uniform(0.8, 1.2))
        return taken[-1]

    driver = make_long_driver(0.2, step_seconds=varying)
    _, long, _ = start_stream_and_prompt(driver)
    while long not in driver.outputs:
        driver.step()

    kept = sum(took <= 0.2 for took in taken[10:])
    assert kept >= 0.95 * len(taken[10:])


def test_the_tokens_are_those_of_steps_without_a_bound(make_long_driver: Callable[..., Driver]) -> None:
    driver = make_long_driver(0.1)
    stream, long, prompt = start_stream_and_prompt(driver)
    driver.finish()

    assert driver.token_ids(long) == reference_tokens(bytes(prompt), 4)
    assert driver.token_ids(stream) == reference_tokens(b"x" * 64, 400)


def test_a_prompt_alone_takes_whole_steps(make_long_driver: Callable[..., Driver]) -> None:
    driver = make_long_driver(0.05)
    driver.submit([98] * 2048, max_tokens=1)

    assert [batch.num_tokens for batch in driver.finish()] == [256] * 8


def test_prompts_go_on_by_small_chunks_on_a_machine_too_slow_for_the_bound(
    make_long_driver: Callable[..., Driver],
) -> None:
    driver = make_long_driver(0.2, step_seconds=lambda batch: 1.0 * batch.num_tokens)
    driver.submit([99] * 32, max_tokens=100)
    driver.step()
    driver.submit([98] * 64, max_tokens=1)

    sizes = [driver.step().num_tokens for _ in range(4)]  # type: ignore[union-attr]

    assert sizes == [MIN_CHUNK_TOKENS + 1] * 4


@pytest.mark.parametrize("start", [0, 100, 8000])
def test_the_pace_follows_a_machine_that_turns_slow(start: int) -> None:
    pace = StepPace(0.2)
    chunks = [(position, 128) for position in range(0, 4096, 128)]
    for slowness in (1, 10):
        for position, num in chunks:
            pace.observe([(position, num)], slowness * (PER_TOKEN * num + PER_PAIR * (position * num + num**2 / 2)))

    fitting = pace.num_chunk_tokens(start, num_others=0)

    assert fitting is not None
    took = 10 * (PER_TOKEN * fitting + PER_PAIR * (start * fitting + fitting**2 / 2))
    assert fitting == MIN_CHUNK_TOKENS or took <= 0.22


@pytest.mark.parametrize("num_before", [0, 32])
def test_after_a_step_that_was_interrupted_few_chunks_are_small(num_before: int) -> None:
    def took(num: int) -> float:
        return PER_TOKEN * num + PER_PAIR * num**2 / 2

    pace = StepPace(0.2)
    for _ in range(num_before):
        pace.observe([(0, 128)], took(128))
    pace.observe([(0, 128)], 300.0)

    sizes = list[int]()
    for _ in range(4):
        fitting = pace.num_chunk_tokens(0, num_others=0)
        assert fitting is not None
        sizes.append(fitting)
        pace.observe([(0, fitting)], took(fitting))

    assert sizes[0] == MIN_CHUNK_TOKENS
    assert all(0.08 <= took(size) <= 0.22 for size in sizes[1:])


def test_times_that_fit_no_machine_give_a_chunk_all_the_same() -> None:
    rng = random.Random(2)
    pace = StepPace(0.2)
    assert pace.num_chunk_tokens(0, 1) is None
    for _ in range(1000):
        pace.observe([(rng.randrange(8192), rng.randrange(1, 257))], rng.choice([0.0, rng.random(), 1e3]))
        fitting = pace.num_chunk_tokens(rng.randrange(8192), rng.randrange(300))
        assert fitting is None or fitting >= MIN_CHUNK_TOKENS

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
            num_blocks=2048,
        )

    return make


def start_stream_and_prompt(driver: Driver) -> tuple[str, str, list[int]]:
    stream = driver.submit(list(b"x" * 64), max_tokens=400)
    for _ in range(3):
        driver.step()
    prompt = [random.Random(1).randrange(97, 122) for _ in range(3000)]
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

    assert max(map(seconds, batches)) <= 0.2
    sizes = [max(len(seq.token_ids) for seq in batch.seqs) for batch in batches]
    assert sizes[0] > sizes[-2] >= MIN_CHUNK_TOKENS, "chunks get smaller as the prompt goes on"
    assert sum(map(seconds, batches[:-1])) >= 0.14 * len(batches[:-1]), "the time is used"


def test_before_a_prompt_was_computed_a_stream_waits_for_the_least_chunk(
    make_long_driver: Callable[..., Driver],
) -> None:
    driver = make_long_driver(0.2)
    driver.submit("short", max_tokens=2000)
    driver.step()
    driver.submit([98] * 3000, max_tokens=4)

    sizes = [driver.step().num_tokens for _ in range(3)]  # type: ignore[union-attr]

    assert sizes[0] == MIN_CHUNK_TOKENS + 1 < sizes[1]


def test_two_long_prompts_at_once_hold_a_stream_up_no_longer_than_one(make_long_driver: Callable[..., Driver]) -> None:
    driver = make_long_driver(0.2)
    _, first, prompt = start_stream_and_prompt(driver)
    second = driver.submit(prompt[::-1], max_tokens=4)

    batches: list[Batch] = []
    while not (first in driver.outputs and second in driver.outputs):
        batch = driver.step()
        assert batch is not None
        batches.append(batch)

    assert max(map(seconds, batches)) <= 0.2
    assert sum(map(seconds, batches[:-1])) >= 0.12 * len(batches[:-1]), "the time is used"


def test_a_prompt_whose_beginning_is_cached_is_not_begun_in_a_step_that_was_sized_for_a_short_one(
    make_long_driver: Callable[..., Driver],
) -> None:
    driver = make_long_driver(0.2)
    _, long, prompt = start_stream_and_prompt(driver)
    while long not in driver.outputs:
        driver.step()
    driver.submit([99] * 20, max_tokens=4)
    driver.submit([*prompt, *[100] * 200], max_tokens=4)

    batches = [driver.step() for _ in range(12)]

    assert max(seq.start for batch in batches if batch for seq in batch.seqs if len(seq.token_ids) > 1) >= 3000
    assert max(seconds(batch) for batch in batches if batch) <= 0.2


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

    fitting = pace.num_chunk_tokens(start)

    took = 10 * (PER_TOKEN * fitting + PER_PAIR * (start * fitting + fitting**2 / 2))
    assert fitting == MIN_CHUNK_TOKENS or took <= 0.22


def test_streams_with_long_texts_leave_less_time_to_a_prompt() -> None:
    pace = StepPace(0.2)
    for position in range(0, 4096, 128):
        pace.observe([(position, 128)], PER_TOKEN * 128 + PER_PAIR * (position * 128 + 128**2 / 2))

    fitting = pace.num_chunk_tokens(0, [4000] * 20)

    took = PER_TOKEN * (fitting + 20) + PER_PAIR * (fitting**2 / 2 + 20 * 4000)
    assert 0.12 <= took <= 0.18


@pytest.mark.parametrize("start", [0, 7000])
@pytest.mark.parametrize("before", [[7500], [100] * 20, [900, 7500, 100, 100, 100]])
def test_prompts_of_one_kind_do_not_spoil_the_chunks_of_another(before: list[int], start: int) -> None:
    """Chunks late in a long prompt, or all at its start, are too alike to tell attention from the matrices."""

    def took(start: int, num: int) -> float:
        return PER_TOKEN * num + PER_PAIR * (start * num + num**2 / 2)

    for seed in range(20):
        noise, pace = random.Random(seed), StepPace(0.2)
        for length in before:
            position = 0
            while position < length:
                num = min(pace.num_chunk_tokens(position), length - position)
                pace.observe([(position, num)], took(position, num) * noise.uniform(0.8, 1.2))
                position += num

        assert took(start, pace.num_chunk_tokens(start)) <= 0.22


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
        fitting = pace.num_chunk_tokens(0)
        sizes.append(fitting)
        pace.observe([(0, fitting)], took(fitting))

    assert sizes[0] == MIN_CHUNK_TOKENS
    assert all(0.08 <= took(size) <= 0.22 for size in sizes[1:])


def test_times_that_fit_no_machine_give_a_chunk_all_the_same() -> None:
    rng = random.Random(2)
    pace = StepPace(0.2)
    for _ in range(1000):
        pace.observe([(rng.randrange(8192), rng.randrange(1, 257))], rng.choice([0.0, rng.random(), 1e3]))
        fitting = pace.num_chunk_tokens(rng.randrange(8192), [rng.randrange(8192)] * rng.randrange(300))
        assert fitting >= MIN_CHUNK_TOKENS

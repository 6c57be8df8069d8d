"""A draft model changes how many steps a text takes, and nothing else. It is used only while it pays."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brlite.config.options import EngineConfig, LimitsConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.backend import Batch, ScheduledSeq
from brlite.engine.draft_model import FIRST_TRIAL_STEPS, MAX_BUDGET, DraftPlan
from brlite.engine.engine import Engine
from brlite.sampling_params import SamplingParams, StructuredOutput
from tests.engine.conftest import Driver
from tests.engine.test_speculation import (
    always_a,
    engine_options,
    num_drafted,
    requests,
    run,
    stopping_token,
    without_timing,
)
from tests.fakes import VOCAB_SIZE, ByteTokenizer, FakeBackend, printable_token, reference_tokens

NextToken = Callable[[Sequence[int], int], int]
LONG: dict[str, Any] = {"num_blocks": 256, "max_model_len": 1024}
VERIFYING = {**LONG, "max_draft_tokens": 7}


def half_right(context: Sequence[int], seed: int) -> int:
    """Agrees with `printable_token` at about half of the places."""
    return printable_token(context, seed) if sum(context) % 2 else ord("z")


def wrong(context: Sequence[int], seed: int) -> int:
    return (printable_token(context, seed) + 1) % 256


def drafted_by(driver: Driver) -> list[Batch]:
    assert driver.engine.draft_model is not None
    return driver.engine.draft_model.backend.batches  # type: ignore[attr-defined, no-any-return]


def make(next_token: NextToken = printable_token, draft: dict[str, Any] | None = None, **options: Any) -> Driver:
    draft_backend = FakeBackend(next_token=next_token, **{**LONG, **(draft or {})})
    return Driver(draft_backend=draft_backend, **{"budget": 64, **VERIFYING, **options})


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 6), requests), min_size=2, max_size=6),
    num_blocks=st.sampled_from([8, 11, 64]),
    max_num_seqs=st.integers(2, 4),
    budget=st.sampled_from([5, 16]),
    draft_token=st.sampled_from([stopping_token, printable_token, half_right]),
    num_draft_blocks=st.sampled_from([3, 9, 64]),
    draft_seconds=st.sampled_from([0.01, 0.1, 0.9]),
    failing=st.sampled_from([0, 7]),
)
def test_outputs_are_the_same_with_and_without_a_draft_model(
    asked: list[tuple[int, dict[str, Any]]],
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    draft_token: NextToken,
    num_draft_blocks: int,
    draft_seconds: float,
    failing: int,
) -> None:
    def fault(seq: ScheduledSeq) -> str | None:
        return "it failed" if failing and (seq.start + 1) % failing == 0 else None

    options = engine_options(num_blocks, max_num_seqs, budget)
    draft = FakeBackend(next_token=draft_token, num_blocks=num_draft_blocks, fault=fault)
    off = Driver(engine={"speculation": "off"}, **options)
    on = Driver(draft_backend=draft, draft_seconds=draft_seconds, **options)

    expected, found = run(off, asked), run(on, asked)

    assert found.keys() == expected.keys()
    for request_id, output in found.items():
        assert without_timing(output) == without_timing(expected[request_id])


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "seeded"])
def test_a_model_that_drafts_for_itself_is_always_right(params: dict[str, Any]) -> None:
    driver = make()

    request_id = driver.submit("hello", max_tokens=200, **params)
    batches = driver.finish()

    stats = driver.engine.stats
    assert driver.token_ids(request_id) == reference_tokens(b"hello", 200, seed=params.get("seed", 0))
    assert stats.accepted_tokens == stats.draft_tokens > 100
    assert len(batches) < 200 / 3


def test_sequences_draft_together_through_preemption_and_aborts() -> None:
    """The fake computes from what its blocks hold, so a slip in the small model's blocks would give wrong drafts."""
    driver = make(num_blocks=16, max_num_seqs=3, max_model_len=64)
    answers = {driver.submit(prompt, max_tokens=32): prompt for prompt in ("hello", "bye")}
    for _ in range(4):
        driver.step()
    aborted = driver.submit("a third one", max_tokens=30)
    driver.step()
    driver.engine.abort(aborted)
    answers[driver.submit("hello", max_tokens=32, temperature=1.0, seed=5)] = "hello"

    driver.finish()

    for (request_id, prompt), seed in zip(answers.items(), (0, 0, 5), strict=True):
        assert driver.token_ids(request_id) == reference_tokens(prompt.encode(), 32, seed=seed)
    stats = driver.engine.stats
    assert stats.preemptions > 0
    assert stats.accepted_tokens == stats.draft_tokens > 0
    assert max(len(batch.seqs) for batch in drafted_by(driver)) > 1


def test_the_small_model_finds_a_prompt_in_its_own_cache() -> None:
    driver = make()
    driver.submit("one and the same beginning, then a", max_tokens=20)
    driver.finish()
    num_before = len(drafted_by(driver))

    driver.submit("one and the same beginning, then b", max_tokens=20)
    driver.finish()

    assert drafted_by(driver)[num_before].seqs[0].start == 32
    assert driver.engine.stats.accepted_tokens == driver.engine.stats.draft_tokens


def test_the_small_model_computes_a_long_prompt_in_chunks_beside_the_answer() -> None:
    driver = make(budget=16, max_num_seqs=1)

    driver.submit("a prompt " * 12, max_tokens=200)
    driver.finish()

    assert max(batch.num_tokens for batch in drafted_by(driver)) == 16
    assert driver.engine.stats.accepted_tokens == driver.engine.stats.draft_tokens > 0


def test_a_prompt_that_the_small_model_must_compute_first_holds_back_no_other_sequence() -> None:
    driver = make(max_num_seqs=2, draft_seconds=0.1, step_seconds=forecast_seconds, budget=512)
    driver.submit("a prompt that it must compute first, " * 24, max_tokens=100)
    driver.step()
    short = driver.submit("hello", max_tokens=60)

    num_steps = 0
    while short not in driver.finished:
        driver.step()
        num_steps += 1

    assert num_steps < 20  # 30 if it waits


def test_a_sequence_beyond_the_small_models_context_gets_no_drafts() -> None:
    driver = make(draft={"max_model_len": 32})

    request_id = driver.submit("hello", max_tokens=60)
    driver.finish()

    assert driver.token_ids(request_id) == reference_tokens(b"hello", 60)
    assert 20 < max(seq.start + len(seq.token_ids) for batch in drafted_by(driver) for seq in batch.seqs) <= 32


def test_drafts_that_the_small_model_does_not_make_are_not_paid() -> None:
    driver = make(draft={"max_model_len": 64}, draft_seconds=0.1, step_seconds=forecast_seconds)
    request_id = driver.submit("hello", max_tokens=120)
    model = driver.engine.draft_model
    assert model is not None
    while not driver.engine.running or driver.engine.running[0].num_tokens < 66:
        driver.step()
    (seq,) = driver.engine.running
    saved, budget = seq.steps_saved, model.budget
    assert saved > 0

    driver.finish()

    assert driver.token_ids(request_id) == reference_tokens(b"hello", 120)
    assert model.budget == budget
    assert seq.steps_saved > saved - 1  # n-grams may have had drafts


def test_a_long_prompt_that_is_computed_in_chunks_is_paid_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def paid(num_tokens: int) -> float:
        driver, costs = make(budget=64, max_num_seqs=1, draft_seconds=0.1, step_seconds=forecast_seconds), [0.0]
        model = driver.engine.draft_model
        assert model is not None
        model.budget = MAX_BUDGET
        pay = model.pay
        monkeypatch.setattr(model, "pay", lambda num_steps: [costs.append(num_steps), pay(num_steps)][1])
        driver.submit([number * number * 7 % 91 + 32 for number in range(num_tokens)], max_tokens=100)
        while not driver.engine.stats.draft_tokens:
            driver.step()
        return sum(costs)

    assert 0 < paid(800) < 2.2 * paid(400)


def test_tokens_that_the_served_model_does_not_have_are_never_given_to_it() -> None:
    driver = make(next_token=lambda context, seed: VOCAB_SIZE + 3)

    request_id = driver.submit("hello", max_tokens=20)
    batches = driver.finish()

    assert driver.token_ids(request_id) == reference_tokens(b"hello", 20)
    assert num_drafted(batches) == 0


def test_a_plan_has_no_draft_tokens_of_a_sequence_that_the_small_model_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver, plans = make(), list[DraftPlan]()
    model = driver.engine.draft_model
    assert model is not None
    monkeypatch.setattr(model, "info", msgspec.structs.replace(model.info, vocab_size=128))
    run = model.run
    monkeypatch.setattr(model, "run", lambda plan: [plans.append(plan), run(plan)][1])

    answers = {driver.submit(prompt, max_tokens=20): prompt for prompt in ("hello", "é")}
    driver.finish()

    for request_id, prompt in answers.items():
        assert driver.token_ids(request_id) == reference_tokens(prompt.encode(), 20)
    assert plans
    for plan in plans:
        assert plan.num_draft_tokens.keys() == {seq.seq_id for seq in plan.batch.seqs}


def forecast_seconds(batch: Batch) -> float:
    return 1.0 + 0.09 * min(3, batch.num_tokens - 1) + 0.2 * max(0, batch.num_tokens - 4)


def seconds_of_eight(driver: Driver) -> float:
    for number in range(8):
        driver.submit(f"request {number}", max_tokens=120)
        driver.finish()
    return driver.now


@pytest.fixture(scope="module")
def plain_seconds() -> float:
    return seconds_of_eight(
        Driver(budget=64, step_seconds=forecast_seconds, engine={"speculation": "off"}, **VERIFYING)
    )


@pytest.mark.parametrize("draft_seconds", [0.02, 0.1, 0.3, 1.5])
@pytest.mark.parametrize("next_token", [printable_token, half_right, wrong])
def test_with_a_draft_model_no_text_takes_over_a_33rd_longer(
    next_token: NextToken, draft_seconds: float, plain_seconds: float
) -> None:
    """Rows cost in this test what the forecast says, so that what drafts cost and bring is counted, not timed."""
    taken = seconds_of_eight(make(next_token, step_seconds=forecast_seconds, draft_seconds=draft_seconds))

    assert taken <= plain_seconds / 0.97
    if next_token is printable_token and draft_seconds <= 0.1:
        assert taken <= plain_seconds / 1.5


@pytest.mark.parametrize("draft_seconds", [0.02, 0.1, 0.3, 1.5])
@pytest.mark.parametrize("next_token", [half_right, wrong])
def test_the_first_answer_behind_a_long_prompt_loses_no_tenth_to_a_bad_draft_model(
    next_token: NextToken, draft_seconds: float
) -> None:
    def seconds(driver: Driver) -> float:
        driver.submit("a prompt that it must compute first, " * 6, max_tokens=128)
        driver.finish()
        return driver.now

    plain = seconds(Driver(budget=64, step_seconds=forecast_seconds, engine={"speculation": "off"}, **VERIFYING))
    taken = seconds(make(next_token, step_seconds=forecast_seconds, draft_seconds=draft_seconds))

    assert taken <= plain / 0.9


def test_a_draft_model_that_does_not_pay_is_tried_again_ever_more_rarely() -> None:
    driver = make(wrong, draft_seconds=0.02, budget=512, step_seconds=forecast_seconds)

    driver.submit("hello", max_tokens=512)
    driver.finish()

    reached = [batch.seqs[0].start + len(batch.seqs[0].token_ids) for batch in drafted_by(driver)]
    gaps = [after - before for before, after in itertools.pairwise(reached) if after - before > 10]
    assert len(gaps) > 1
    assert all(after > 1.5 * before for before, after in itertools.pairwise(gaps))
    assert gaps[0] >= FIRST_TRIAL_STEPS


def test_a_text_that_repeats_itself_is_left_to_ngrams() -> None:
    draft_backend = FakeBackend(next_token=always_a, **LONG)
    driver = Driver(draft_backend=draft_backend, next_token=always_a, budget=64, **VERIFYING)

    driver.submit("hello", max_tokens=400)
    batches = driver.finish()

    assert len(batches) < 400 / 5
    assert len(drafted_by(driver)) < len(batches)


def test_drafts_are_verified_under_a_grammar() -> None:
    wish = StructuredOutput(regex="[a-z]{5}[0-9]{3}[a-z]{40}")
    off, on = Driver(budget=64, engine={"speculation": "off"}, **VERIFYING), make()

    for each in (off, on):
        each.submit("hello", request_id="one", max_tokens=60, structured=wish)
        each.finish()

    assert on.token_ids("one") == off.token_ids("one")
    assert len(on.token_ids("one")) == 48
    assert on.engine.stats.accepted_tokens > 0
    assert on.engine.stats.accepted_tokens < on.engine.stats.draft_tokens


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 0.5}, {"min_tokens": 40}, {"bad_words": ["bcd"]}],
    ids=lambda params: next(iter(params)),
)
def test_sequences_that_cannot_have_drafts_do_not_reach_the_draft_model(params: dict[str, Any]) -> None:
    driver = make()

    driver.submit("hello", max_tokens=40, **params)
    driver.finish()

    assert not drafted_by(driver)


def test_a_draft_model_that_fails_is_used_no_more_and_harms_no_request(caplog: pytest.LogCaptureFixture) -> None:
    def fault(seq: ScheduledSeq) -> str | None:
        if seq.start > 20:
            raise RuntimeError("no memory")
        return None

    driver = make(draft={"fault": fault})

    request_id = driver.submit("hello", max_tokens=100)
    driver.finish()

    assert driver.token_ids(request_id) == reference_tokens(b"hello", 100)
    assert caplog.text.count("the draft model failed and is not used any more") == 1
    assert driver.engine.draft_model is not None
    assert driver.engine.draft_model.is_off
    assert driver.engine.stats.draft_model_failures == 1

    driver.engine.reset()
    assert driver.engine.draft_model.is_off


def test_no_block_of_the_small_model_is_held_when_nothing_runs() -> None:
    driver = make()
    driver.submit("hello", max_tokens=40)
    driver.finish()

    assert driver.engine.draft_model is not None
    assert driver.engine.draft_model.num_used_blocks == 0


def test_the_event_loops_engine_runs_the_draft_model_on_the_step_thread_and_closes_it() -> None:
    backend, draft = FakeBackend(**VERIFYING), FakeBackend(**LONG)

    async def ask() -> list[list[int]]:
        engine = Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig(), draft_backend=draft)  # type: ignore[arg-type]

        async def answer(seed: int) -> list[int]:
            params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed)
            tokens = []
            async for output in loop.generate("hello", params):
                tokens += output.outputs[0].token_ids
            return tokens

        async with EngineLoop(engine, backend) as loop:
            return await asyncio.gather(*(answer(seed) for seed in range(3)))

    answers = asyncio.run(ask())

    assert answers == [reference_tokens(b"hello", 60, seed=seed) for seed in range(3)]
    assert draft.batches
    assert draft.is_closed
    assert backend.is_closed

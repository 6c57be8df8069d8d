"""Prompts whose embeddings are wanted, stepped by hand on a fake model beside others that generate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from brlite.config.options import LimitsConfig
from brlite.engine.backend import ScheduledSeq
from brlite.errors import EngineError, InvalidRequest, PromptTooLong
from brlite.sampling_params import Pooling, PoolingParams
from tests.engine.conftest import Driver, MakeDriver
from tests.fakes import BLOCK_SIZE, HIDDEN_SIZE, hidden_state, reference_tokens

RAW_LAST, RAW_MEAN = (PoolingParams(pooling=pooling, normalize=False) for pooling in ("last", "mean"))
PROMPT = list(b"a prompt of 24 letters..")


def mean_state(prompt: Sequence[int]) -> list[float]:
    states = [hidden_state(prompt[:length]) for length in range(1, len(prompt) + 1)]
    return [sum(column) / len(prompt) for column in zip(*states, strict=True)]


def embedding(driver: Driver, request_id: str) -> list[float]:
    found = driver.outputs[request_id].embedding
    assert found is not None
    return found.tolist()


@pytest.mark.parametrize("budget", [1, 5, 64])
def test_an_embedding_is_that_of_the_whole_prompt_in_whatever_chunks(make_driver: MakeDriver, budget: int) -> None:
    driver = make_driver(budget=budget, max_num_seqs=1)

    last, mean = driver.submit(PROMPT, pooling=RAW_LAST), driver.submit(PROMPT, pooling=RAW_MEAN)
    driver.finish()

    assert embedding(driver, last) == hidden_state(PROMPT)
    assert embedding(driver, mean) == pytest.approx(mean_state(PROMPT), rel=1e-6)
    assert driver.outputs[last].outputs[0].finish_reason == "stop"
    assert driver.outputs[last].outputs[0].token_ids == []


def test_embeddings_and_completions_share_a_step_and_change_nothing_of_each_other(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64)
    chat = driver.submit("hello", max_tokens=8)
    driver.step()

    embedded = [driver.submit(PROMPT, pooling=RAW_MEAN), driver.submit(PROMPT[:9], pooling=RAW_LAST)]
    batch = driver.step()
    driver.finish()

    assert batch is not None
    assert [seq.pooling is None for seq in batch.seqs] == [True, False, False]
    assert [seq.sampling is None for seq in batch.seqs] == [False, True, True]
    assert driver.token_ids(chat) == reference_tokens(b"hello", 8)
    assert embedding(driver, embedded[1]) == hidden_state(PROMPT[:9])


def test_the_last_token_is_pooled_on_a_cached_prefix_and_a_mean_is_computed_whole(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64)
    driver.submit(PROMPT, max_tokens=1)
    driver.finish()

    last, mean = driver.submit(PROMPT, pooling=RAW_LAST), driver.submit(PROMPT, pooling=RAW_MEAN)
    batch = driver.step()

    assert batch is not None
    assert [seq.start for seq in batch.seqs] == [len(PROMPT) - BLOCK_SIZE, 0]
    assert driver.outputs[last].num_cached_tokens == len(PROMPT) - BLOCK_SIZE
    assert driver.outputs[mean].num_cached_tokens == 0
    assert embedding(driver, mean) == pytest.approx(mean_state(PROMPT), rel=1e-6)


def test_a_completion_shares_what_an_embedding_has_computed(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64)
    driver.submit(PROMPT, pooling=RAW_MEAN)
    driver.finish()

    chat = driver.submit([*PROMPT, 1], max_tokens=4)
    driver.finish()

    assert driver.outputs[chat].num_cached_tokens == len(PROMPT)
    assert driver.token_ids(chat) == reference_tokens([*PROMPT, 1], 4)


def test_a_preempted_prompt_starts_its_mean_anew(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=8, num_blocks=9, max_num_seqs=2, max_model_len=36)
    driver.submit("ab", max_tokens=18, ignore_eos=True, tenant="other")
    driver.step()

    mean = driver.submit(PROMPT, pooling=RAW_MEAN)
    rest = [driver.submit(PROMPT[::-1], pooling=RAW_MEAN) for _ in range(3)]
    driver.finish()

    assert driver.engine.stats.preemptions > 0
    assert embedding(driver, mean) == pytest.approx(mean_state(PROMPT), rel=1e-6)
    assert embedding(driver, rest[-1]) == pytest.approx(mean_state(PROMPT[::-1]), rel=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_models_own_pooling_is_taken_where_the_request_has_none(make_driver: MakeDriver, pooling: Pooling) -> None:
    driver = make_driver(budget=64, pooling=pooling)

    own = driver.submit(PROMPT, pooling=PoolingParams())
    named = driver.submit(PROMPT, pooling=PoolingParams(pooling=pooling))
    driver.finish()

    assert embedding(driver, own) == embedding(driver, named)


def test_embeddings_are_of_length_1_unless_told_otherwise_and_cut_before(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64, matryoshka_dimensions=(2,))

    whole = driver.submit(PROMPT, pooling=PoolingParams())
    short = driver.submit(PROMPT, pooling=PoolingParams(dimensions=2))
    driver.finish()

    raw = hidden_state(PROMPT)
    assert math.hypot(*embedding(driver, whole)) == pytest.approx(1)
    assert embedding(driver, short) == pytest.approx([value / math.hypot(*raw[:2]) for value in raw[:2]])


@pytest.mark.parametrize(
    ("backend", "params", "message"),
    [
        ({"hidden_size": 0}, PoolingParams(), "embeddings cannot be had from this server's engine"),
        ({"pooling": "none"}, PoolingParams(), "this model has no embeddings"),
        ({}, PoolingParams(dimensions=2), "dimensions must be 4 for this model, got 2"),
        ({"matryoshka_dimensions": (2, 3)}, PoolingParams(dimensions=1), "dimensions must be 2, 3, 4 for this model"),
        ({"matryoshka_dimensions": (0,)}, PoolingParams(dimensions=5), "dimensions must be 1 to 4 for this model"),
    ],
)
def test_what_a_model_does_not_give_is_refused(
    make_driver: MakeDriver, backend: dict[str, object], params: PoolingParams, message: str
) -> None:
    driver = make_driver(**backend)

    with pytest.raises(InvalidRequest, match=message):
        driver.submit(PROMPT, pooling=params)


@pytest.mark.parametrize("field", [{"pooling": "cls"}, {"dimensions": 0}, {"dimensions": True}, {"dimensions": 2.5}])
def test_params_out_of_range_are_refused_by_name(field: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PoolingParams(**field)  # type: ignore[arg-type]

    assert caught.value.param == next(iter(field))


def test_a_prompt_may_fill_the_context(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64, max_model_len=64)
    prompt = [5] * 64

    with pytest.raises(PromptTooLong, match="the prompt has 65 tokens"):
        driver.submit([5] * 65, pooling=RAW_LAST)
    whole = driver.submit(prompt, pooling=RAW_LAST)
    driver.finish()

    assert embedding(driver, whole) == hidden_state(prompt)


def test_an_embedding_counts_its_prompt_and_no_token_times(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64)

    driver.submit(PROMPT, pooling=RAW_MEAN)
    driver.finish()

    stats = driver.engine.stats
    assert (stats.prompt_tokens, stats.generation_tokens) == (len(PROMPT), 0)
    assert stats.finished == {"stop": 1}
    assert sum(stats.time_to_first_token.counts) == sum(stats.generation_length.counts) == 0
    assert sum(stats.e2e_latency.counts) == sum(stats.prompt_length.counts) == 1


def test_hidden_states_that_are_not_finite_end_their_request_only(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.hidden_state", lambda context: [math.nan if 7 in context else 1.0] * HIDDEN_SIZE)
    driver = make_driver(budget=64)

    broken, sound = driver.submit([*PROMPT, 7], pooling=RAW_MEAN), driver.submit(PROMPT, pooling=RAW_MEAN)
    driver.finish()

    assert isinstance(driver.errors[broken], EngineError)
    assert "not finite" in str(driver.errors[broken])
    assert embedding(driver, sound) == [1.0] * HIDDEN_SIZE


def test_aborted_and_failed_embeddings_give_their_blocks_back(make_driver: MakeDriver) -> None:
    def fault(seq: ScheduledSeq) -> str | None:
        return "broken" if 9 in seq.token_ids else None

    driver = make_driver(budget=4, limits=LimitsConfig(), fault=fault)
    aborted, failed = driver.submit(PROMPT, pooling=RAW_MEAN), driver.submit([*PROMPT, 9], pooling=RAW_MEAN)
    driver.step()
    driver.engine.abort(aborted)
    driver.finish()

    assert driver.outputs[aborted].outputs[0].finish_reason == "abort"
    assert driver.outputs[aborted].embedding is None
    assert "broken" in str(driver.errors[failed])

"""What the native kernels are told of each draw, and what becomes of their answers. No kernels are needed."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest

from brlite.backends.native import abi
from brlite.backends.native.draws import Drawing, DrawTarget, NativeDraws, StepDraws
from brlite.backends.sampling.random_numbers import uniform
from brlite.engine.backend import SampledToken, SamplingInput, Undrawn
from brlite.engine.outputs import TokenLogprob
from brlite.sampling_params import SamplingParams

VOCAB_SIZE = 1000


def drawing(
    *, row: int = 0, banned: tuple[int, ...] = (), counts: dict[int, int] | None = None, **params: Any
) -> Drawing:
    counts = counts or {}
    sampling = SamplingInput(
        SamplingParams(**params),
        seed=5,
        position=8,
        counted_token_ids=np.array(list(counts), dtype=np.int32).tobytes(),
        output_counts=np.array(list(counts.values()), dtype=np.int32).tobytes(),
        banned_token_ids=banned,
    )
    return Drawing(row, sampling, sampling.position)


def told(step: StepDraws) -> list[abi.Draw]:
    return list((abi.Draw * step.num_draws).from_address(step.draws_address))


def integers(address: int, count: int) -> list[int]:
    return list((ctypes.c_int32 * count).from_address(address))


def floats(address: int, count: int) -> list[float]:
    return list((ctypes.c_float * count).from_address(address))


def answer(
    step: StepDraws, index: int, token: int, logprob: float = math.nan, top: dict[int, float] | None = None
) -> None:
    """Fill one draw's result in, as the kernels do."""
    drawn = (abi.Drawn * step.num_draws).from_address(step.drawn_address)[index]
    drawn.token, drawn.logprob = token, logprob
    for i, (token_id, value) in enumerate((top or {}).items()):
        ctypes.c_int32.from_address(drawn.top_ids + 4 * i).value = token_id
        ctypes.c_float.from_address(drawn.top_logprobs + 4 * i).value = value


@pytest.fixture
def draws() -> NativeDraws:
    return NativeDraws(VOCAB_SIZE)


# What the kernels are told


def test_parameters_arrive_as_they_are(draws: NativeDraws) -> None:
    truncation = {"top_k": 7, "top_p": 0.9, "min_p": 0.1, "top_n_sigma": 1.5}
    step = draws.lay_out([drawing(row=3, temperature=0.5, presence_penalty=0.3, frequency_penalty=0.2, **truncation)])

    [draw] = told(step)
    assert (draw.row, draw.target, draw.temperature, draw.top_k, draw.top_p, draw.min_p) == (3, -1, 0.5, 7, 0.9, 0.1)
    assert draw.top_n_sigma == 1.5
    assert (draw.presence_penalty, draw.frequency_penalty, draw.repetition_penalty) == (0.3, 0.2, 1.0)
    assert draw.num_logprobs == -1


@pytest.mark.parametrize(("top_k", "expected"), [(-1, VOCAB_SIZE), (1, 1), (10**12, VOCAB_SIZE)])
def test_top_k_is_the_vocabulary_where_it_is_off(draws: NativeDraws, top_k: int, expected: int) -> None:
    [draw] = told(draws.lay_out([drawing(top_k=top_k)]))

    assert draw.top_k == expected


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, 0.0), (9e-6, 0.0), (1e-5, np.float32(1e-5))])
def test_a_temperature_of_zero_means_greedy(draws: NativeDraws, temperature: float, expected: float) -> None:
    [draw] = told(draws.lay_out([drawing(temperature=temperature)]))

    assert draw.temperature == expected


def test_an_extreme_temperature_stays_finite(draws: NativeDraws) -> None:
    [draw] = told(draws.lay_out([drawing(temperature=1e300)]))

    assert math.isfinite(draw.temperature)


def test_draft_tokens_of_one_request_draw_at_their_own_positions(draws: NativeDraws) -> None:
    first = drawing()

    step = draws.lay_out([first, first._replace(row=1, position=9)])

    assert [(draw.row, draw.uniform) for draw in told(step)] == [(0, uniform(5, 8)), (1, uniform(5, 9))]


def test_edits_are_pointed_to(draws: NativeDraws) -> None:
    step = draws.lay_out(
        [
            drawing(),
            drawing(logit_bias={4: 1.5, 9: -2.0}, repetition_penalty=1.5, banned=(7, 8, 9), counts={5: 2, 6: 0}),
        ]
    )

    plain, draw = told(step)
    assert (plain.num_biases, plain.num_banned, plain.num_counted) == (0, 0, 0)
    assert integers(draw.bias_ids, draw.num_biases) == [4, 9]
    assert floats(draw.biases, draw.num_biases) == [1.5, -2.0]
    assert integers(draw.banned_ids, draw.num_banned) == [7, 8, 9]
    assert integers(draw.counted_ids, draw.num_counted) == [5, 6]
    assert integers(draw.output_counts, draw.num_counted) == [2, 0]


def test_counts_are_left_out_without_penalties(draws: NativeDraws) -> None:
    [draw] = told(draws.lay_out([drawing(counts={5: 2}, banned=(1,))]))

    assert (draw.num_banned, draw.num_counted) == (1, 0)


def test_targets_come_after_the_drawings(draws: NativeDraws) -> None:
    step = draws.lay_out([drawing(row=4)], [DrawTarget(0, 17, 2), DrawTarget(1, 18, 2 * VOCAB_SIZE)])

    wanted = [(draw.row, draw.target, draw.num_logprobs) for draw in told(step)]
    assert wanted == [(4, -1, -1), (0, 17, 2), (1, 18, VOCAB_SIZE)]


def test_a_request_is_packed_once_however_many_there_are(draws: NativeDraws) -> None:
    requests = [drawing(row=row, top_k=row % 50 + 1) for row in range(3000)]

    step, fewer = draws.lay_out(requests), draws.lay_out(requests[:3])

    assert [draw.top_k for draw in told(step)] == [row % 50 + 1 for row in range(3000)]
    assert [draw.top_k for draw in told(fewer)] == [1, 2, 3]


def test_a_step_may_draw_nothing(draws: NativeDraws) -> None:
    step = draws.lay_out([])

    assert (step.num_draws, step.tokens(), step.target_logprobs()) == (0, [], [])


# What becomes of the answers


def test_a_token_below_zero_says_why_there_is_none(draws: NativeDraws) -> None:
    step = draws.lay_out([drawing(), drawing(logprobs=1), drawing()])
    answer(step, 0, 31)
    answer(step, 1, -1)
    answer(step, 2, -2)

    assert step.tokens() == [SampledToken(31), Undrawn.NOT_FINITE, Undrawn.NOTHING_ALLOWED]


def test_each_row_gets_the_alternatives_that_it_asked_for(draws: NativeDraws) -> None:
    step = draws.lay_out([drawing(logprobs=0), drawing(logprobs=2), drawing()], [DrawTarget(0, 9, 1)])
    answer(step, 0, 1, -0.5)
    answer(step, 1, 2, -0.25, {7: -0.125, 8: -1.5})
    answer(step, 2, 3)
    answer(step, 3, 9, -2.0, {6: -0.75})

    assert step.tokens() == [
        SampledToken(1, TokenLogprob(1, -0.5)),
        SampledToken(2, TokenLogprob(2, -0.25, ((7, -0.125), (8, -1.5)))),
        SampledToken(3),
    ]
    assert step.target_logprobs() == [TokenLogprob(9, -2.0, ((6, -0.75),))]


def test_a_target_without_finite_logits_has_no_alternatives(draws: NativeDraws) -> None:
    step = draws.lay_out([], [DrawTarget(0, 9, 3)])
    answer(step, 0, -1)

    [found] = step.target_logprobs()

    assert found.token_id == 9
    assert math.isnan(found.logprob)
    assert found.top == ()

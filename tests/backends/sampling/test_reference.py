"""Logits in numpy and in torch: the same tokens from the same logits. Which sampler draws on the host."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from brlite.backends.native.library import NativeLibrary
from brlite.backends.sampling import host as host_sampler
from brlite.backends.sampling import reference
from brlite.backends.sampling.host import NativeSampler, ReferenceSampler, choose_sampler
from brlite.backends.sampling.rows import NumpyRows
from brlite.backends.torch.candidates import TorchRows
from brlite.engine.backend import SampledToken, Undrawn
from brlite.errors import NativeUnavailable
from tests.backends.native.test_sampling import (
    SHAPES,
    VOCABULARIES,
    assert_same_draws,
    assert_same_logprobs,
    entry,
    random_entry,
    random_logits,
)


def token_ids(drawn: list[SampledToken | Undrawn]) -> list[int | None]:
    return [None if isinstance(token, Undrawn) else token.token_id for token in drawn]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_logits_in_numpy_and_in_torch_draw_the_same(vocab_size: int, shape: str) -> None:
    rng = np.random.default_rng(vocab_size)
    num_rows = 24 if vocab_size < 10_000 else 2
    logits = SHAPES[shape](random_logits(num_rows, vocab_size, seed=vocab_size))
    inputs = [random_entry(rng, vocab_size) for _ in range(num_rows)]

    drawn = reference.sample(NumpyRows(logits.copy()), inputs)

    expected = reference.sample(TorchRows(torch.from_numpy(logits.copy())), inputs)
    assert assert_same_draws(logits, inputs, expected, drawn) == 0


def test_a_row_is_drawn_alike_in_any_company() -> None:
    logits = random_logits(40, 1000)
    inputs = [random_entry(np.random.default_rng(seed), 1000) for seed in range(40)]

    together = reference.sample(NumpyRows(logits.copy()), inputs)

    alone = [reference.sample(NumpyRows(logits[row : row + 1].copy()), inputs[row : row + 1])[0] for row in range(40)]
    assert together == alone


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("edit", [{}, {"banned": (77,)}, {"logit_bias": {77: -100.0}}, {"repetition_penalty": 2.0}])
def test_a_row_that_is_not_finite_gives_no_token(value: float, edit: dict[str, Any]) -> None:
    logits = random_logits(2, 300)
    logits[0, 77] = value

    drawn = reference.sample(NumpyRows(logits), [entry(counts={77: 2}, **edit)] * 2)

    assert drawn[0] is Undrawn.NOT_FINITE
    assert isinstance(drawn[1], SampledToken)


def test_a_row_without_a_possible_token_gives_none() -> None:
    logits = random_logits(2, 20)
    logits[0] = -np.inf

    assert reference.sample(NumpyRows(logits), [entry(), entry(banned=range(20))]) == [
        Undrawn.NOT_FINITE,
        Undrawn.NOTHING_ALLOWED,
    ]


@pytest.mark.parametrize("num_top", [0, 1, 5, 400])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_logprobs_of_targets_are_those_of_torch(shape: str, num_top: int) -> None:
    logits = SHAPES[shape](random_logits(8, 300))
    targets = np.random.default_rng(2).integers(0, 300, 8).tolist()

    found = reference.token_logprobs(NumpyRows(logits), targets, num_top)

    for ours, theirs in zip(
        found, reference.token_logprobs(TorchRows(torch.from_numpy(logits)), targets, num_top), strict=True
    ):
        assert_same_logprobs(ours, theirs)


def test_a_target_in_a_row_that_is_not_finite_has_no_logprob() -> None:
    logits = random_logits(1, 300)
    logits[0, 200] = math.nan

    [found] = reference.token_logprobs(NumpyRows(logits), [3], 2)

    assert math.isnan(found.logprob)
    assert found.top == ()


# Which of them draws


def test_native_and_numpy_samplers_draw_the_same(native_library: NativeLibrary) -> None:
    logits = random_logits(30, 5000)
    inputs = [random_entry(np.random.default_rng(seed), 5000) for seed in range(30)]
    targets = list(range(30))
    native, plain = NativeSampler(native_library, 5000), ReferenceSampler()

    reported = [sampler.token_logprobs(logits, targets, 3) for sampler in (native, plain)]
    drawn = [token_ids(sampler.sample(logits.copy(), inputs)) for sampler in (native, plain)]

    assert drawn[0] == drawn[1]
    for ours, theirs in zip(*reported, strict=True):
        assert_same_logprobs(ours, theirs)


def test_large_vocabularies_are_drawn_natively_where_that_is_possible(native_library: NativeLibrary) -> None:
    def find_none() -> NativeLibrary | None:
        raise NativeUnavailable("no compiler")

    small, large = host_sampler.SMALL_VOCABULARY, host_sampler.SMALL_VOCABULARY + 1
    chosen = [
        choose_sampler(small, lambda: native_library),
        choose_sampler(large, lambda: native_library),
        choose_sampler(large, lambda: None),
        choose_sampler(large, find_none),
    ]

    assert [type(each) for each in chosen] == [ReferenceSampler, NativeSampler, ReferenceSampler, ReferenceSampler]

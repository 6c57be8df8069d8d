"""Draws with torch on a device, here the CPU, against the reference on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from brlite.backends.sampling import reference
from brlite.backends.sampling.rows import NumpyRows
from brlite.backends.torch.draws import SHORTLIST, can_draw, draw
from brlite.engine.backend import SampledToken, SamplingInput, TokenMasks
from brlite.sampling_params import SamplingParams

SMALL, LARGE = 300, 5000  # of two words in a tail, and of many shortlists
SETTINGS: dict[str, dict[str, float | int]] = {
    "greedy": {"temperature": 0.0},
    "all": {"temperature": 1.0},
    "hot": {"temperature": 40.0},
    "cold": {"temperature": 0.05},
    "top k": {"temperature": 1.3, "top_k": 7},
    "one": {"temperature": 2.0, "top_k": 1},
    "as many as the shortlist": {"temperature": 3.0, "top_k": SHORTLIST},
    "more than the shortlist": {"temperature": 3.0, "top_k": SHORTLIST + 1},
    "top p": {"temperature": 1.0, "top_p": 0.6},
    "least p": {"temperature": 1.0, "top_p": 1e-9},
    "top k and p": {"temperature": 1.5, "top_k": 40, "top_p": 0.8},
    "min p": {"temperature": 1.5, "min_p": 0.2},
    "all three": {"temperature": 5.0, "top_k": 90, "top_p": 0.95, "min_p": 0.05},
}


def random_logits(vocab_size: int, seed: int, *, rounding: float = 0.0) -> Tensor:
    """A row; with `rounding` many of its logits are equal."""
    row = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))
    return row if rounding == 0 else (row / rounding).round() * rounding


def draws_of_host(logits: Tensor, inputs: Sequence[SamplingInput]) -> list[int]:
    found = reference.sample(NumpyRows(logits.numpy().copy()), inputs)
    return [token.token_id if isinstance(token, SampledToken) else -1 for token in found]


@pytest.mark.parametrize("rounding", [0.0, 2.0], ids=["distinct", "ties"])
@pytest.mark.parametrize("vocab_size", [3, SMALL, LARGE])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_draws_are_those_of_the_host(settings: dict[str, float | int], vocab_size: int, rounding: float) -> None:
    params = SamplingParams(**settings)
    logits = torch.stack([random_logits(vocab_size, seed, rounding=rounding) for seed in range(24)])
    inputs = [SamplingInput(params, seed=row * row - 5, position=row) for row in range(len(logits))]

    assert draw(logits, inputs).tolist() == draws_of_host(logits, inputs)


def test_a_row_is_drawn_as_it_is_alone() -> None:
    inputs = [SamplingInput(SamplingParams(**each), 9, 4) for each in SETTINGS.values()]
    logits = torch.stack([random_logits(LARGE, seed) for seed in range(len(inputs))])

    together = draw(logits, inputs).tolist()

    assert together == [int(draw(logits[row : row + 1], inputs[row : row + 1])) for row in range(len(inputs))]


def test_a_row_of_equal_logits_is_drawn_by_the_lowest_ids() -> None:
    inputs = [SamplingInput(SamplingParams(temperature=1.0, top_k=3), 0, position) for position in range(40)]

    assert set(draw(torch.zeros(len(inputs), LARGE), inputs).tolist()) == {0, 1, 2}


def test_a_row_that_is_not_finite_gives_no_token_and_others_theirs() -> None:
    row = random_logits(SMALL, 1)
    broken = [row.clone() for _ in range(4)]
    broken[0][7], broken[1][9] = torch.nan, torch.inf
    broken[2].fill_(-torch.inf)
    for settings in SETTINGS.values():
        inputs = [SamplingInput(SamplingParams(**settings), 2, 3)] * 4

        found = draw(torch.stack(broken), inputs).tolist()

        assert found == [-1, -1, -1, int(draw(row.unsqueeze(0), inputs[:1]))]


def test_many_rows_are_drawn_some_at_a_time() -> None:
    vocab_size = 2**19  # 16 rows at a time
    inputs = [SamplingInput(SamplingParams(temperature=1.0, top_k=50), 3, position) for position in range(18)]
    logits = random_logits(vocab_size, 0).expand(len(inputs), vocab_size)

    assert draw(logits, inputs).tolist() == draws_of_host(logits, inputs)


@pytest.mark.parametrize(
    "only_on_host",
    [
        *[{"logprobs": 0}, {"presence_penalty": 0.1}, {"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}}],
        *[{"allowed_token_ids": [3, 4]}, {"typical_p": 0.9}, {"xtc_probability": 0.5}, {"dynatemp_range": 0.5}],
        {"top_n_sigma": 1.0},
    ],
    ids=lambda each: next(iter(each)),
)
def test_what_needs_more_than_logits_is_left_to_the_host(only_on_host: dict[str, object]) -> None:
    assert can_draw(SamplingInput(SamplingParams(temperature=1.0), 0, 0), None)
    assert not can_draw(SamplingInput(SamplingParams(temperature=1.0, **only_on_host), 0, 0), None)  # type: ignore[arg-type]


def test_a_mask_and_banned_tokens_are_left_to_the_host() -> None:
    params = SamplingParams(temperature=0.0)
    mask = TokenMasks(SMALL, {5: 1}).of(5)

    assert not can_draw(SamplingInput(params, 0, 0), mask)
    assert not can_draw(SamplingInput(params, 0, 0, banned_token_ids=(2,)), None)


def test_the_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    inputs = [SamplingInput(SamplingParams(temperature=1.0), 11, position) for position in range(4000)]

    drawn = draw(logits.expand(len(inputs), 4), inputs)

    shares = torch.bincount(drawn, minlength=4) / len(inputs)
    np.testing.assert_allclose(shares, logits[0].softmax(dim=0), atol=0.03)

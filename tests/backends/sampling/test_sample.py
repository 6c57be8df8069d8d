"""The sampler against a slow, obvious one: a full sort of the row in float64, and one pass of the inverse CDF.

Both with logits in numpy and with logits in torch, as on a card.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from brlite.backends.sampling import reference
from brlite.backends.sampling.random_numbers import another, invert_cdf, uniform
from brlite.backends.sampling.reference import FLOAT_MAX, SHORTLIST_SIZES
from brlite.backends.sampling.rows import LogitRows, NumpyRows
from brlite.backends.torch.candidates import TorchRows
from brlite.engine.backend import SampledToken, SamplingInput, Undrawn
from brlite.sampling_params import SamplingParams

Floats = npt.NDArray[np.float64]

SMALL, LARGE = 50, 3000  # vocabularies that fit the shortlist, and that do not
TRUNCATIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 10},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": SMALL},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.01, "top_p": 0.7, "top_k": 20},
    {"temperature": 0.5, "top_p": 0.95},
    {"top_n_sigma": 1.0},
    {"top_n_sigma": 0.5, "temperature": 2.0, "top_p": 0.9},
    {"top_n_sigma": 2.0, "top_k": 12, "min_p": 0.05},
    {"typical_p": 0.3},
    {"typical_p": 0.9, "top_k": 20, "temperature": 0.7},
    {"typical_p": 0.7, "top_p": 0.8, "min_p": 0.1},
    {"typical_p": 1e-9},
    {"xtc_probability": 1, "xtc_threshold": 0.05},
    {"xtc_probability": 0.5, "xtc_threshold": 0.01, "top_p": 0.9},
    {"xtc_probability": 1, "xtc_threshold": 0.02, "typical_p": 0.8, "top_k": 30},
    {"xtc_probability": 1, "xtc_threshold": 0.6},
    {"dynatemp_range": 0.5, "top_p": 0.9},
    {"dynatemp_range": 5.0, "dynatemp_exponent": 2.0, "top_k": 40},
    {"dynatemp_range": 1e300, "dynatemp_exponent": 0},
    {"temperature": 3.0, "top_k": 30, "min_p": 0.2},
    {"temperature": 1e-4},
    {"temperature": 1e-4, "top_p": 0.5},
    {"temperature": 1e30},
    {"temperature": 1e30, "top_p": 0.3},
    {"temperature": 1e300, "top_k": 7},
]
LARGE_TRUNCATIONS: list[dict[str, Any]] = [
    {"top_k": SHORTLIST_SIZES[0] - 1},
    {"top_k": SHORTLIST_SIZES[0]},
    {"top_k": SHORTLIST_SIZES[0] + 1},
    {"top_k": 1000},
    {"top_k": LARGE},
    {"top_k": LARGE, "top_p": 0.9},
    {"top_k": 1000, "top_p": 0.9},
    {"top_k": 500, "top_p": 0.999, "min_p": 0.02},
    {"top_k": 500, "top_p": 1e-9},
    {"top_p": 0.9999999},
    {"temperature": 5.0, "min_p": 0.3},
    {"top_n_sigma": 3.0, "top_p": 0.8},
    {"top_n_sigma": 1e300},
    {"typical_p": 0.5, "top_k": 1000, "top_p": 0.9},
    {"dynatemp_range": 0.9, "top_k": 300, "xtc_probability": 1, "xtc_threshold": 0},
]


RowsOf = Callable[[torch.Tensor], LogitRows]
Draw = Callable[[torch.Tensor, Sequence[SamplingInput]], list[SampledToken | Undrawn]]


# Logits as a sampler takes them. What it writes is seen in the tensor.
ROWS: dict[str, RowsOf] = {"numpy": lambda logits: NumpyRows(logits.numpy()), "torch": TorchRows}


@pytest.fixture(params=ROWS)
def rows_of(request: pytest.FixtureRequest) -> RowsOf:
    return ROWS[request.param]


@pytest.fixture
def sample(rows_of: RowsOf) -> Draw:
    return lambda logits, inputs: reference.sample(rows_of(logits), inputs)


def entry(
    *,
    seed: int = 7,
    position: int = 0,
    banned: tuple[int, ...] = (),
    counts: dict[int, int] | None = None,
    costs: dict[int, float] | None = None,
    **params: Any,
) -> SamplingInput:
    counts, costs = counts or {}, costs or {}
    return SamplingInput(
        params=SamplingParams(**params),
        seed=seed,
        position=position,
        counted_token_ids=np.array(list(counts), dtype=np.int32).tobytes(),
        output_counts=np.array(list(counts.values()), dtype=np.int32).tobytes(),
        banned_token_ids=banned,
        cost_token_ids=np.array(list(costs), dtype=np.int32).tobytes(),
        costs=np.array(list(costs.values()), dtype=np.float32).tobytes(),
    )


def random_logits(num_rows: int, vocab_size: int, *, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def token_ids(results: Sequence[SampledToken | Undrawn]) -> list[int | None]:
    return [None if isinstance(result, Undrawn) else result.token_id for result in results]


def slow_probabilities(logits: torch.Tensor, params: SamplingParams, *, has_chance: bool = False) -> Floats:
    """What temperature and truncation leave of one row [V]: sort it all, cut it, normalise.

    `has_chance`: whether XTC has its chance.
    """
    row = logits.numpy().astype(np.float64)
    order = np.lexsort((np.arange(len(row)), -row))
    distances = row[order[0]] - row[order]
    top_k = len(row) if params.top_k == -1 else params.top_k
    is_kept = np.arange(len(row)) < top_k
    if params.top_n_sigma > 0:
        is_kept &= row[order] >= row.max() - params.top_n_sigma * row[row > -np.inf].std()
    weights = np.exp(-distances / slow_temperature(distances[is_kept & (distances < np.inf)], params))
    if params.typical_p < 1:
        is_kept &= weights > 0
        mean = np.average(distances[is_kept], weights=weights[is_kept])
        off_center = np.where(is_kept, abs(distances - mean), np.inf)
        enough = params.typical_p * weights[is_kept].sum()
        radii = np.unique(off_center[is_kept])
        is_kept &= off_center <= next(radius for radius in radii if weights[off_center <= radius].sum() >= enough)
    better_mass = np.append(0.0, (weights * is_kept).cumsum()[:-1])
    least = params.min_p * weights[is_kept].max()
    if params.top_p < 1:
        is_kept &= better_mass < params.top_p * weights[is_kept].sum()
    is_kept &= weights >= least
    shares = np.where(is_kept, weights, 0) / weights[is_kept].sum()
    if has_chance:
        is_kept &= distances >= max(distances[(shares > 0) & (shares >= params.xtc_threshold)], default=0)
    probabilities = np.zeros(len(row))
    probabilities[order[is_kept]] = weights[is_kept]
    return probabilities / probabilities.sum()


def slow_temperature(distances: Floats, params: SamplingParams) -> float:
    """The temperature for tokens so far below the best one."""
    if params.dynatemp_range == 0:
        return params.temperature
    shares = np.exp(-distances) / np.exp(-distances).sum()
    entropy = -(shares * np.log(shares, where=shares > 0, out=np.zeros(len(shares)))).sum()
    share = entropy / np.log(len(shares)) if len(shares) > 1 else 0.0
    low = max(params.temperature - params.dynatemp_range, 0.0)
    high = params.temperature + params.dynatemp_range
    return float(min(max(low + (high - low) * max(share, 0) ** params.dynatemp_exponent, 1e-5), 1e37))


def slow_token(logits: torch.Tensor, row: SamplingInput) -> int:
    number = uniform(row.seed, row.position)
    probabilities = slow_probabilities(logits, row.params, has_chance=another(number) < row.params.xtc_probability)
    return int((probabilities.cumsum() <= number).sum())


def assert_draws_like_the_slow_sampler(logits: torch.Tensor, params: dict[str, Any]) -> None:
    """Of logits in numpy and in torch: the slow one, which takes most of the time, draws once for both."""
    inputs = [entry(seed=seed, position=11, **params) for seed in range(len(logits))]
    expected = [slow_token(row, input_) for row, input_ in zip(logits, inputs, strict=True)]

    drawn = {kind: token_ids(reference.sample(rows_of(logits.clone()), inputs)) for kind, rows_of in ROWS.items()}

    assert drawn == dict.fromkeys(ROWS, expected)


def chi_square(counts: npt.NDArray[np.int64], probabilities: Floats) -> float:
    """In standard deviations above its mean: beyond 4 the counts do not come from these probabilities."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


# Truncation and drawing


@pytest.mark.parametrize("params", TRUNCATIONS)
def test_a_small_vocabulary_draws_like_a_full_sort(params: dict[str, Any]) -> None:
    assert_draws_like_the_slow_sampler(random_logits(32, SMALL), params)


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0], ids=["flat", "normal", "peaked"])
@pytest.mark.parametrize("params", TRUNCATIONS + LARGE_TRUNCATIONS)
def test_a_large_vocabulary_draws_like_a_full_sort(params: dict[str, Any], scale: float) -> None:
    assert_draws_like_the_slow_sampler(random_logits(8, LARGE, scale=scale), params)


@pytest.mark.parametrize("params", TRUNCATIONS + LARGE_TRUNCATIONS)
def test_of_equal_logits_the_lower_ids_survive(params: dict[str, Any]) -> None:
    coarse = random_logits(8, LARGE, scale=1.0).mul_(4).round_().div_(4)

    assert_draws_like_the_slow_sampler(coarse, params)


@pytest.mark.parametrize("params", LARGE_TRUNCATIONS)
def test_zeros_of_either_sign_are_equal(params: dict[str, Any]) -> None:
    zeros = torch.zeros(8, LARGE)
    zeros[:, ::2] = -0.0

    assert_draws_like_the_slow_sampler(zeros, params)


@pytest.mark.parametrize("params", TRUNCATIONS + LARGE_TRUNCATIONS)
def test_rows_of_one_value_are_truncated_by_id(params: dict[str, Any]) -> None:
    assert_draws_like_the_slow_sampler(torch.full((8, LARGE), -3.0), params)


@pytest.mark.parametrize("params", TRUNCATIONS + LARGE_TRUNCATIONS)
def test_masked_tokens_are_never_drawn(params: dict[str, Any]) -> None:
    logits = random_logits(8, LARGE)
    logits[:, 3:] = -torch.inf

    assert_draws_like_the_slow_sampler(logits, params)


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.95}, {"top_k": 1}, {"temperature": 9.0, "min_p": 0.5}])
def test_vocabularies_at_the_borders_of_shortlist_and_blocks(vocab_size: int, params: dict[str, Any]) -> None:
    assert_draws_like_the_slow_sampler(random_logits(12, vocab_size, scale=1.0), params)


def test_the_last_token_can_be_drawn_from_a_short_last_block(sample: Draw) -> None:
    logits = torch.full((16, 1500), -torch.inf)
    logits[:, 1499] = 0.0

    drawn = sample(logits, [entry(seed=seed) for seed in range(16)])

    assert token_ids(drawn) == [1499] * 16


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_greedy_takes_the_lowest_id_of_the_best(sample: Draw, temperature: float) -> None:
    logits = torch.zeros(2, LARGE)
    logits[0, [2500, 40]] = 5.0

    drawn = sample(logits, [entry(temperature=temperature), entry(temperature=temperature)])

    assert token_ids(drawn) == [40, 0]


def test_top_k_1_is_greedy_even_among_equals(sample: Draw) -> None:
    logits = torch.zeros(20, LARGE)
    logits[:, [2500, 40]] = 5.0

    drawn = sample(logits, [entry(seed=seed, top_k=1) for seed in range(20)])

    assert token_ids(drawn) == [40] * 20


@pytest.mark.parametrize(
    ("vocab_size", "params"),
    [
        (20, {}),
        (20, {"temperature": 1.7, "top_k": 8}),
        (600, {"top_k": 12, "top_p": 0.9}),
        (600, {"temperature": 2.0}),
        (600, {"temperature": 2.0, "top_p": 0.4}),
        (600, {"temperature": 2.0, "top_k": 300, "min_p": 0.1}),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(sample: Draw, vocab_size: int, params: dict[str, Any]) -> None:
    num_draws = 4_000
    logits = random_logits(1, vocab_size, seed=3, scale=1.0)

    drawn = sample(logits.repeat(num_draws, 1), [entry(seed=1, position=p, **params) for p in range(num_draws)])

    counts = np.bincount(
        [result.token_id for result in drawn if isinstance(result, SampledToken)], minlength=vocab_size
    )
    assert chi_square(counts, slow_probabilities(logits[0], SamplingParams(**params))) < 4


# Random numbers


def test_uniforms_are_reproducible_everywhere() -> None:
    key = (7).to_bytes(16, "little") + (3).to_bytes(8, "little")
    digest = hashlib.blake2b(key, digest_size=8, person=b"brlite").digest()

    assert uniform(7, 3) == (int.from_bytes(digest, "little") >> 11) / 2**53


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**64 - 1])
def test_uniforms_fill_the_unit_interval_evenly(seed: int) -> None:
    drawn = np.array([uniform(seed, position) for position in range(10_000)])

    counts, _ = np.histogram(drawn, bins=100, range=(0, 1))

    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert chi_square(counts, np.full(100, 0.01)) < 4


def test_neighbouring_seeds_and_positions_share_no_numbers() -> None:
    numbers = {uniform(seed, position) for seed in (-1, 0, 1, 2**64 - 1) for position in range(1000)}

    assert len(numbers) == 4000


def test_a_target_at_either_end_picks_a_token_that_has_weight() -> None:
    weights = np.array([[0.0, 0.3, 0.0, 0.7, 0.0]] * 3)

    picks, rest = invert_cdf(weights, np.array([0.0, 0.3, 1.0]))

    assert picks.tolist() == [1, 3, 3]
    assert (rest >= 0).all()


# A row and its company


def mixed_company() -> tuple[torch.Tensor, list[SamplingInput]]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 10},
        {"top_p": 0.9, "logprobs": 0},
        {"logprobs": 20},
        {"temperature": 50.0, "top_p": 0.5},
        {"temperature": 50.0, "top_k": 2000, "top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 9.0, "min_p": 0.6},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "counts": {1: 2, 5: 0}, "logit_bias": {9: 20.0}},
        {"banned": (0, 1), "top_p": 0.99},
    ]
    inputs = [entry(seed=seed, position=seed, **kinds[seed % len(kinds)]) for seed in range(30)]
    return random_logits(30, 40_000), inputs


def test_a_row_draws_alone_what_it_draws_in_company(sample: Draw) -> None:
    logits, inputs = mixed_company()

    together = sample(logits.clone(), inputs)
    alone = [sample(logits[row : row + 1].clone(), [inputs[row]])[0] for row in range(len(inputs))]

    assert alone == together


def test_the_order_of_rows_changes_nothing(sample: Draw) -> None:
    logits, inputs = mixed_company()
    order = np.random.default_rng(0).permutation(len(inputs)).tolist()

    in_order = sample(logits.clone(), inputs)
    shuffled = sample(logits[order], [inputs[row] for row in order])

    assert shuffled == [in_order[row] for row in order]


def test_seed_and_position_both_change_the_draw(sample: Draw) -> None:
    inputs = [entry(seed=seed, position=position) for seed in range(8) for position in range(8)]

    drawn = sample(torch.zeros(64, LARGE), inputs)

    assert len(set(token_ids(drawn))) > 55


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 5, "logprobs": 2}, {"top_p": 0.9}])
@pytest.mark.parametrize("poison", ["nan", "inf", "-inf"])
def test_a_broken_row_gives_none_and_harms_no_other(sample: Draw, poison: str, params: dict[str, Any]) -> None:
    logits = random_logits(3, LARGE)
    broken = logits.clone()
    if poison == "-inf":
        broken[1] = -torch.inf
    else:
        broken[1, 17] = float(poison)
    inputs = [entry(seed=seed, **params) for seed in range(3)]

    healthy, drawn = sample(logits, inputs), sample(broken, inputs)

    assert drawn == [healthy[0], Undrawn.NOT_FINITE, healthy[2]]


@pytest.mark.parametrize("edit", [{"banned": (17,)}, {"counts": {17: 1}, "presence_penalty": 1e30}])
def test_an_edit_does_not_hide_that_a_row_is_broken(sample: Draw, edit: dict[str, Any]) -> None:
    logits = random_logits(1, LARGE)
    logits[0, 17] = torch.inf

    drawn = sample(logits, [entry(**edit)])

    assert drawn == [Undrawn.NOT_FINITE]


def test_no_rows_give_no_tokens(sample: Draw) -> None:
    assert sample(torch.zeros(0, LARGE), []) == []


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_xtc_has_its_chance_and_the_draw_does_not_depend_on_it(sample: Draw, probability: float) -> None:
    logits = torch.tensor([[0.0, 0.0, 1.0, 1.0, -50.0]]).repeat(6000, 1)
    inputs = [entry(seed=seed, xtc_probability=probability, xtc_threshold=0.1) for seed in range(6000)]

    counts = np.bincount(np.array(token_ids(sample(logits, inputs))), minlength=5)

    usual, excluded = (slow_probabilities(logits[0], inputs[0].params, has_chance=chance) for chance in (False, True))
    assert excluded[:2].tolist() == [0.5, 0.5]
    assert abs(chi_square(counts, (1 - probability) * usual + probability * excluded)) < 4


# Bias, bans and penalties


def test_a_bias_shifts_its_token_before_the_draw(sample: Draw) -> None:
    logits = torch.zeros(2, LARGE)

    drawn = sample(logits, [entry(logit_bias={2999: 100.0}), entry(temperature=0, logit_bias={0: -100.0})])

    assert token_ids(drawn) == [2999, 1]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"logit_bias": {4: 100.0}}])
def test_a_banned_token_is_never_drawn(sample: Draw, params: dict[str, Any]) -> None:
    logits = torch.full((40, LARGE), -50.0)
    logits[:, 4] = 50.0

    drawn = sample(logits, [entry(seed=seed, banned=(4, 5), **params) for seed in range(40)])

    assert not {4, 5, None} & set(token_ids(drawn))


def test_costs_are_taken_off_after_the_penalties(sample: Draw) -> None:
    logits = torch.full((4, LARGE), -50.0)
    logits[:, 4], logits[:, 5], logits[:, 6] = 8.0, 3.0, 2.5
    halved = {"repetition_penalty": 2.0, "counts": {4: 1}}

    drawn = sample(
        logits,
        [
            entry(temperature=0, costs={4: 4.5}),
            entry(temperature=0, costs={4: 5.5}),
            entry(temperature=0, costs={4: 1.25}, **halved),  # 8 / 2 - 1.25 is above 2.5, (8 - 1.25) / 2 above 3
            entry(temperature=0, costs={4: 1e30, 5: 1e30}),
        ],
    )

    assert token_ids(drawn) == [4, 5, 5, 6]


def test_a_row_with_every_token_banned_gives_none(sample: Draw) -> None:
    drawn = sample(torch.zeros(2, 3), [entry(banned=(0, 1, 2)), entry(banned=(0, 1))])

    assert token_ids(drawn) == [None, 2]


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 0.7},
        {"frequency_penalty": -0.4},
        {"repetition_penalty": 2.0, "presence_penalty": -1.5, "frequency_penalty": 0.3},
    ],
)
def test_penalties_equal_the_formula_written_out(rows_of: RowsOf, penalties: dict[str, float]) -> None:
    logits = random_logits(4, SMALL)
    counts = [{}, {3: 0, 7: 2}, {row: row for row in range(SMALL)}, {49: 1000}]
    inputs = [entry(counts=count, **penalties) for count in counts]
    expected = logits.double()
    for row, count in enumerate(counts):
        for token_id, times in count.items():
            factor = inputs[row].params.repetition_penalty
            value = float(logits[row, token_id])
            value = value / factor if value > 0 else value * factor
            value -= inputs[row].params.presence_penalty * (times > 0) + inputs[row].params.frequency_penalty * times
            expected[row, token_id] = value

    reference.edit(rows_of(logits), inputs)

    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)


def test_rows_without_penalties_are_left_as_they_are(rows_of: RowsOf) -> None:
    logits = random_logits(3, SMALL)
    before = logits.clone()

    reference.edit(rows_of(logits), [entry(), entry(repetition_penalty=1.5, counts={1: 1}), entry(counts={1: 1})])

    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert (logits[1] != before[1]).nonzero().tolist() == [[1]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("size", [1e30, 1e308])
def test_a_penalty_beyond_reason_stays_finite(rows_of: RowsOf, name: str, size: float, sign: int) -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf, FLOAT_MAX, -FLOAT_MAX]])
    row = entry(counts=dict.fromkeys(range(5), 2**31 - 1), repetition_penalty=1e-300, **{name: sign * size})

    reference.edit(rows_of(logits), [row])

    assert logits.isfinite().tolist() == [[True, True, False, True, True]]
    assert logits[0, 2] == -torch.inf


@pytest.mark.parametrize("repetition_penalty", [5e-324, 1e-30, 1e30, 1e308])
@pytest.mark.parametrize("temperature", [1e-4, 1.0, 1e30])
@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_extremes_together_still_draw(
    sample: Draw, repetition_penalty: float, temperature: float, vocab_size: int
) -> None:
    params = {"repetition_penalty": repetition_penalty, "temperature": temperature, "top_p": 0.9, "min_p": 0.01}
    logits = random_logits(8, vocab_size)
    inputs = [entry(seed=seed, counts=dict.fromkeys(range(0, vocab_size, 2), 1), **params) for seed in range(8)]

    drawn = sample(logits, inputs)

    assert None not in token_ids(drawn)


# Logprobs


def test_logprobs_are_the_models_own_whatever_the_draw_was_told(sample: Draw) -> None:
    logits = random_logits(4, LARGE)
    expected = torch.log_softmax(logits.double(), dim=1)
    inputs = [
        entry(logprobs=5, temperature=0),
        entry(logprobs=0, temperature=3.0, top_p=0.5),
        entry(logprobs=2, banned=tuple(range(2000)), logit_bias={2500: 100.0}),
        entry(top_k=4),
    ]

    drawn = sample(logits.clone(), inputs)

    for row, num_top in enumerate((5, 0, 2)):
        result = drawn[row]
        assert isinstance(result, SampledToken)
        assert result.logprob is not None
        best = expected[row].topk(num_top)
        assert result.logprob.token_id == result.token_id
        assert result.logprob.logprob == pytest.approx(float(expected[row, result.token_id]), abs=1e-5)
        assert [token_id for token_id, _ in result.logprob.top] == best.indices.tolist()
        assert [logprob for _, logprob in result.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert isinstance(drawn[3], SampledToken)
    assert drawn[3].logprob is None


@pytest.mark.parametrize("num_rows", [1, 1000])
def test_logprobs_of_given_tokens_leave_the_logits_alone(rows_of: RowsOf, num_rows: int) -> None:
    logits = random_logits(num_rows, LARGE)
    before = logits.clone()
    targets = [row * 7 % LARGE for row in range(num_rows)]

    found = reference.token_logprobs(rows_of(logits), targets, 1)

    expected = torch.log_softmax(before.double(), dim=1)
    assert torch.equal(logits, before)
    assert [entry_.token_id for entry_ in found] == targets
    assert [entry_.logprob for entry_ in found] == pytest.approx(expected[range(num_rows), targets].tolist(), abs=1e-5)
    assert [entry_.top[0][0] for entry_ in found] == expected.argmax(dim=1).tolist()


@pytest.mark.parametrize(("vocab_size", "num_equal"), [(100, 3), (100, 60), (300, 30), (300, 300), (LARGE, 60)])
def test_of_equal_alternatives_the_lower_ids_are_shown(rows_of: RowsOf, vocab_size: int, num_equal: int) -> None:
    lowest = vocab_size - num_equal
    logits = torch.zeros(1, vocab_size)
    logits[0, lowest:] = 2.0

    top = reference.token_logprobs(rows_of(logits), [0], 3)[0].top

    assert [token_id for token_id, _ in top] == [lowest, lowest + 1, lowest + 2]


def test_more_alternatives_than_tokens_give_them_all(rows_of: RowsOf) -> None:
    found = reference.token_logprobs(rows_of(torch.tensor([[0.0, 1.0]])), [0], 20)

    assert [token_id for token_id, _ in found[0].top] == [1, 0]

"""The native sampler against the one in numpy, which computes in float64, over thousands of rows.

`backends/sampling/test_reference.py` compares logits in torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from brlite.backends.native.draws import Drawing, DrawTarget, NativeDraws, StepDraws
from brlite.backends.native.library import NativeLibrary, available_isas
from brlite.backends.sampling import reference
from brlite.backends.sampling.random_numbers import Floats, another, uniform
from brlite.backends.sampling.rows import Booleans, Logits, NumpyRows
from brlite.engine.backend import SampledToken, SamplingInput, Undrawn
from brlite.engine.outputs import TokenLogprob
from brlite.sampling_params import SamplingParams

VOCABULARIES = (5, 16, 17, 50, 255, 256, 257, 1000, 3000, 49152, 152064, 300007)


def entry(
    *,
    seed: int = 7,
    position: int = 0,
    banned: Sequence[int] = (),
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
        banned_token_ids=tuple(banned),
        cost_token_ids=np.array(list(costs), dtype=np.int32).tobytes(),
        costs=np.array(list(costs.values()), dtype=np.float32).tobytes(),
    )


def random_logits(num_rows: int, vocab_size: int, *, seed: int = 0, scale: float = 2.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal((num_rows, vocab_size)) * scale).astype(np.float32)


def masked(logits: Logits) -> Logits:
    """Most tokens at -inf, the first one never."""
    is_masked = np.random.default_rng(1).random(logits.shape) < 0.9
    is_masked[:, 0] = False
    return np.where(is_masked, np.float32(-np.inf), logits)


def coarse(logits: Logits) -> Logits:
    """With many ties. No zero is negative."""
    return (np.round(logits * 4) / 4 + 0).astype(np.float32)


SHAPES = {
    "flat": lambda logits: logits * np.float32(0.1),
    "normal": lambda logits: logits,
    "peaked": lambda logits: logits * np.float32(5),
    "ties": coarse,
    "one value": lambda logits: np.full_like(logits, -3.0),
    "masked": masked,
    "far from zero": lambda logits: logits - np.float32(1e4),
}


def random_entry(rng: np.random.Generator, vocab_size: int) -> SamplingInput:
    """Every parameter is there now and then, and extreme now and then."""

    def sometimes(share: float, name: str, *values: float) -> dict[str, Any]:
        return {name: float(rng.choice(values))} if rng.random() < share else {}

    top_k = int(rng.integers(1, min(vocab_size, rng.choice([20, 300, vocab_size])) + 1))
    ids = rng.integers(0, vocab_size, 30).tolist()
    params: dict[str, Any] = {
        **sometimes(0.8, "temperature", 0, 1e-4, 0.1, 0.5, 0.9, 1.5, 5, 1e3, 1e300),
        **sometimes(0.4, "top_p", 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999),
        **sometimes(0.3, "min_p", 1e-4, 0.01, 0.05, 0.3),
        **sometimes(0.2, "top_n_sigma", 1e-6, 0.5, 1.0, 3.0),
        **sometimes(0.2, "typical_p", 1e-9, 0.2, 0.5, 0.9),
        **sometimes(0.2, "xtc_probability", 0.5, 1.0),
        **sometimes(0.2, "xtc_threshold", 0, 0.01, 0.3, 0.6),
        **sometimes(0.1, "dynatemp_range", 0.5, 3.0, 1e300),
        **sometimes(0.1, "dynatemp_exponent", 0, 0.5, 2.0),
        **sometimes(0.2, "repetition_penalty", 0.5, 1.1, 1e300),
        **sometimes(0.2, "presence_penalty", 0.5, -1.0, 1e300),
        **sometimes(0.2, "frequency_penalty", 0.1, -0.2),
    }
    if rng.random() < 0.4:
        params["top_k"] = top_k
    if rng.random() < 0.2:
        params["logit_bias"] = dict.fromkeys(ids[:4], float(rng.uniform(-100, 100)))
    return entry(
        seed=int(rng.integers(2**62)),
        position=int(rng.integers(4000)),
        banned=ids[:2] if rng.random() < 0.2 else (),
        counts=dict.fromkeys(ids, int(rng.integers(0, 4))),
        costs=dict.fromkeys(ids[2:], float(rng.choice([0.5, 3.0, 1e30]))) if rng.random() < 0.2 else None,
        logprobs=int(rng.integers(0, 6)) if rng.random() < 0.3 else None,
        **params,
    )


class Sampler:
    """The kernels of one instruction set, drawing from logits that need no model."""

    def __init__(self, library: NativeLibrary, isa: int) -> None:
        self._functions, self._isa = library.functions, isa

    def draw(self, logits: Logits, inputs: Sequence[SamplingInput]) -> list[SampledToken | Undrawn]:
        return self._run(logits, [Drawing(row, each, each.position) for row, each in enumerate(inputs)]).tokens()

    def report(self, logits: Logits, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
        wanted = [DrawTarget(row, target, num_top) for row, target in enumerate(targets)]
        return self._run(logits, [], wanted).target_logprobs()

    def _run(self, logits: Logits, drawings: Sequence[Drawing], targets: Sequence[DrawTarget] = ()) -> StepDraws:
        num_rows, vocab_size = logits.shape
        draws = NativeDraws(vocab_size).lay_out(drawings, targets)
        result = self._functions.brlite_draw_rows(
            self._isa, draws.draws_address, draws.drawn_address, num_rows, vocab_size, logits.ctypes.data
        )
        assert result == 0
        return draws


@pytest.fixture
def samplers(native_library: NativeLibrary) -> list[Sampler]:
    """One for each instruction set that is here; the first is generic."""
    return [Sampler(native_library, isa) for isa in available_isas(native_library.functions)]


@pytest.fixture
def sampler(native_library: NativeLibrary) -> Sampler:
    return Sampler(native_library, native_library.isa)


def is_near_the_draw(logits: Logits, row: SamplingInput, token_id: int) -> bool:
    """Whether the uniform number lies in this token's part of the CDF, or misses it by rounding.

    Rounding may keep one token more or less where truncation ends, and move a border by a millionth.
    """
    edited = logits.copy()
    reference.edit(NumpyRows(edited[None]), [row])
    values = edited.astype(np.float64)
    order = np.lexsort((np.arange(len(values)), -values))
    number = uniform(row.seed, row.position)
    for nudge in (1, 1 - 1e-6, 1 + 1e-6):
        weights, is_kept = kept_weights(values[order], row.params, number, nudge)
        kept = np.zeros(len(values))
        kept[order[is_kept]] = weights[is_kept]
        cumulative = kept.cumsum() / kept.sum()
        tolerance = 1e-6 + 1.001 * weights[is_kept][-1] / kept.sum()
        start = cumulative[token_id] - kept[token_id] / kept.sum()
        if start - tolerance <= number <= cumulative[token_id] + tolerance:
            return True
    return False


def kept_weights(values: Floats, params: SamplingParams, number: float, nudge: float) -> tuple[Floats, Booleans]:
    """The weights of sorted logits, and which truncation keeps; what it holds masses against is times `nudge`."""
    distances = values[0] - values
    is_kept = np.arange(len(values)) < (len(values) if params.top_k == -1 else params.top_k)
    if params.top_n_sigma > 0:
        is_kept &= values >= values.max() - params.top_n_sigma * values[values > -np.inf].std()
    temperature = min(params.temperature, 1e37)
    if params.dynatemp_range > 0:
        some = distances[is_kept & (distances < np.inf)]
        mass = np.exp(-some).sum()
        entropy = np.log(mass) + (some * np.exp(-some)).sum() / mass
        share = min(max(entropy / np.log(len(some)), 0), 1) if len(some) > 1 else 0
        low, high = max(temperature - params.dynatemp_range, 0), temperature + params.dynatemp_range
        temperature = min(max(low + (high - low) * share**params.dynatemp_exponent, 1e-5), 1e37)
    weights = np.exp(-distances / temperature)
    if params.typical_p < 1:
        is_kept &= weights > 0
        off_center = abs(distances - np.average(distances[is_kept], weights=weights[is_kept]))
        nearest = np.sort(off_center[is_kept])
        masses = weights[is_kept][np.argsort(off_center[is_kept])].cumsum()
        last = np.searchsorted(masses, nudge * params.typical_p * masses[-1])
        is_kept &= off_center <= nearest[min(last, len(nearest) - 1)] * (1 + 1e-6) + 1e-9
    better_mass = np.append(0.0, (weights * is_kept).cumsum()[:-1])
    least = params.min_p * weights[is_kept].max()
    if params.top_p < 1:
        is_kept &= better_mass < nudge * params.top_p * weights[is_kept].sum()
    is_kept &= weights >= least
    if another(number) < params.xtc_probability:
        kept = weights * is_kept
        is_top = is_kept & (kept >= nudge * params.xtc_threshold * kept.sum())
        is_kept &= distances >= distances[is_top].max(initial=0)
    return weights, is_kept


def assert_same_draws(
    logits: Logits,
    inputs: Sequence[SamplingInput],
    drawn: Sequence[SampledToken | Undrawn],
    expected: Sequence[SampledToken | Undrawn],
) -> int:
    """Returns how many tokens differ because a uniform number lies at a border."""
    num_differences = 0
    for row, (ours, theirs) in enumerate(zip(drawn, expected, strict=True)):
        if isinstance(ours, Undrawn) or isinstance(theirs, Undrawn):
            assert ours is theirs
            continue
        if ours.token_id != theirs.token_id:
            assert is_near_the_draw(logits[row], inputs[row], ours.token_id)
            num_differences += 1
        elif ours.logprob is None or theirs.logprob is None:
            assert ours.logprob == theirs.logprob
        else:
            assert_same_logprobs(ours.logprob, theirs.logprob)
    return num_differences


def assert_same_logprobs(ours: TokenLogprob, theirs: TokenLogprob) -> None:
    assert ours.token_id == theirs.token_id
    assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]
    pairs = [
        (ours.logprob, theirs.logprob),
        *((one[1], other[1]) for one, other in zip(ours.top, theirs.top, strict=True)),
    ]
    assert all(math.isclose(one, other, abs_tol=1e-5, rel_tol=1e-6) for one, other in pairs), pairs


# Drawing


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_draws_like_the_sampler_in_numpy(sampler: Sampler, vocab_size: int, shape: str) -> None:
    rng = np.random.default_rng(vocab_size)
    num_rows = 32 if vocab_size < 10_000 else 4
    logits = SHAPES[shape](random_logits(num_rows, vocab_size, seed=vocab_size))
    inputs = [random_entry(rng, vocab_size) for _ in range(num_rows)]

    drawn = sampler.draw(logits, inputs)

    expected = reference.sample(NumpyRows(logits.copy()), inputs)
    assert assert_same_draws(logits, inputs, drawn, expected) <= 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_every_instruction_set_gives_the_same_bits(samplers: list[Sampler], vocab_size: int, shape: str) -> None:
    rng = np.random.default_rng(vocab_size + 1)
    num_rows = 16 if vocab_size < 10_000 else 3
    logits = SHAPES[shape](random_logits(num_rows, vocab_size, seed=vocab_size + 1))
    inputs = [random_entry(rng, vocab_size) for _ in range(num_rows)]

    drawn = [sampler.draw(logits, inputs) for sampler in samplers]

    assert all(each == drawn[0] for each in drawn)


@pytest.mark.parametrize("top_k", [1, 2, 255, 256, 257, 1000, 2999, 3000])
def test_top_k_keeps_that_many(sampler: Sampler, top_k: int) -> None:
    logits = random_logits(1, 3000)
    inputs = [entry(seed=seed, top_k=top_k, temperature=1e30) for seed in range(400)]

    drawn = sampler.draw(np.repeat(logits, 400, axis=0), inputs)

    best = np.argsort(-logits[0], kind="stable")[:top_k]
    order = np.sort(best)
    assert drawn == [SampledToken(int(order[int(uniform(seed, 0) * top_k)])) for seed in range(400)]


def test_a_greedy_row_takes_the_lowest_id_among_equals(sampler: Sampler) -> None:
    logits = np.full((3, 1000), -0.5, dtype=np.float32)
    logits[1, [700, 300, 999]] = 0.0, -0.0, 0.0
    logits[2, 999] = 4.0

    drawn = sampler.draw(logits, [entry(temperature=0.0)] * 3)

    assert drawn == [SampledToken(0), SampledToken(300), SampledToken(999)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("edit", [{}, {"banned": (77,)}, {"logit_bias": {77: -100.0}}])
def test_a_row_that_is_not_finite_gives_no_token(sampler: Sampler, value: float, edit: dict[str, Any]) -> None:
    logits = random_logits(2, 300)
    logits[0, 77] = value

    drawn = sampler.draw(logits, [entry(**edit)] * 2)

    assert drawn[0] is Undrawn.NOT_FINITE
    assert isinstance(drawn[1], SampledToken)


def test_a_row_without_a_possible_token_gives_none(sampler: Sampler) -> None:
    logits = random_logits(2, 20)
    logits[0] = -np.inf

    drawn = sampler.draw(logits, [entry(), entry(banned=range(20))])

    assert drawn == [Undrawn.NOT_FINITE, Undrawn.NOTHING_ALLOWED]


def test_a_row_is_drawn_alike_in_any_company(sampler: Sampler) -> None:
    logits = random_logits(40, 3000)
    inputs = [random_entry(np.random.default_rng(seed), 3000) for seed in range(40)]

    together = sampler.draw(logits, inputs)

    alone = [sampler.draw(logits[row : row + 1], inputs[row : row + 1])[0] for row in range(40)]
    assert together == alone


# Logprobs


@pytest.mark.parametrize("num_top", [0, 1, 5, 20, 400])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_logprobs_of_targets_are_those_of_float64(sampler: Sampler, shape: str, num_top: int) -> None:
    logits = SHAPES[shape](random_logits(8, 3000))
    targets = np.random.default_rng(2).integers(0, 3000, 8).tolist()

    found = sampler.report(logits, targets, num_top)

    expected = reference.token_logprobs(NumpyRows(logits), targets, num_top)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_logprobs(ours, theirs)


def test_reported_logprobs_are_from_before_the_edits(sampler: Sampler) -> None:
    logits = random_logits(1, 500)
    row = entry(temperature=0.0, logprobs=3, logit_bias={9: 100.0}, repetition_penalty=2.0, counts={9: 3}, banned=[8])

    [drawn] = sampler.draw(logits, [row])

    [expected] = reference.token_logprobs(NumpyRows(logits), [9], 3)
    assert isinstance(drawn, SampledToken)
    assert drawn.logprob is not None
    assert_same_logprobs(drawn.logprob, expected)


def test_more_alternatives_than_tokens_are_all_tokens(sampler: Sampler) -> None:
    logits = random_logits(1, 17)

    [found] = sampler.report(logits, [3], 100)

    assert [token_id for token_id, _ in found.top] == np.argsort(-logits[0]).tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_target_in_a_row_that_is_not_finite_has_no_logprob(sampler: Sampler, value: float) -> None:
    logits = random_logits(1, 300)
    logits[0, 200] = value

    [found] = sampler.report(logits, [3], 2)

    assert math.isnan(found.logprob)
    assert found.top == ()


def test_an_instruction_set_that_is_not_there_is_refused(native_library: NativeLibrary) -> None:
    assert native_library.functions.brlite_draw_rows(99, None, None, 0, 1, None) == -1

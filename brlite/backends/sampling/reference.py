"""Chooses the next token for each row of a step's logits. The native kernels (`src/sample.h`) draw the same tokens.

The order of operations, for each row by itself:

1. the reported logprobs are the model's own, before all of the following;
2. logits processors (`logits_processors.py`), at this place as in vLLM 0.4 (`model_executor/layers/sampler.py`);
   `logit_bias`, banned tokens, `allowed_token_ids`, the mask; the penalties; the costs of DRY (p-e-w 2024);
3. a greedy row takes its best token, the lowest id among equals;
4. other rows divide by the temperature and truncate. `top_n_sigma` keeps the tokens whose logit is within that many
   standard deviations of the best one (Tang et al. 2024; over all logits above -inf). `top_k` keeps that many best of
   these, the lowest ids among equals. `typical_p` keeps those nearest to the mean logit, weighted by probability, and
   all equally near, until they hold this share of the mass (Meister et al. 2022). `top_p` keeps the fewest best of
   these that hold this share of their mass. `min_p` drops those less probable than this share of the best one left.
   XTC, with probability `xtc_probability`, drops all tokens with a higher logit than the least probable one that has
   a share of `xtc_threshold` or more. `dynatemp_range` r sets the temperature between temperature - r and
   temperature + r, by (entropy / log of the number)^`dynatemp_exponent` of the tokens that `top_k` keeps, at
   temperature 1;
5. one random number, a function of seed and position alone, picks among the survivors in the order of their ids.

All decisions are computed here in float64, from the few numbers that `LogitRows` reads of logits on the host or a card.
There is no generator state, so a step does not depend on other steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from brlite.backends.sampling.random_numbers import Floats, Integers, another, invert_cdf, uniform
from brlite.backends.sampling.rows import BLOCK_SIZE, Booleans, LogitRows, Logits, Shortlist, allowed_words
from brlite.engine.backend import SampledToken, SamplingInput, TokenMask, Undrawn
from brlite.engine.outputs import TokenLogprob
from brlite.sampling_params import GREEDY_BELOW

MAX_TEMPERATURE = 1e37  # near the largest float32, also in sample.h; every distribution is flat at far lower ones
MIN_TEMPERATURE = GREEDY_BELOW  # the least dynamic temperature
MAX_SIGMAS = 1e30  # the largest `top_n_sigma`; it keeps every token
MAX_PENALTY = 1e30  # larger magnitudes of penalties are cut to this, so that products stay finite in float64
FLOAT_MAX = float(np.finfo(np.float32).max)
# Sizes of the shortlists that are tried before a whole row is sorted. Typical distributions keep a few tokens after
# truncation; the second size is for flat ones.
SHORTLIST_SIZES = (256, 4096)
_UNUSUAL = ("typical_p", "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent")
_TIE_MARGIN = 16  # a few more alternatives than needed, so that a tie at the border rarely needs the whole row


class RowSettings(NamedTuple):
    """Temperature, truncation and random number of each row. `top_k` is the vocabulary's size if it is off."""

    temperature: Floats
    top_k: Integers
    top_p: Floats
    min_p: Floats
    top_n_sigma: Floats
    uniform: Floats
    typical_p: Floats
    xtc_probability: Floats
    xtc_threshold: Floats
    dynatemp_range: Floats
    dynatemp_exponent: Floats

    @classmethod
    def of(cls, inputs: Sequence[SamplingInput], vocab_size: int) -> RowSettings:
        params = [row.params for row in inputs]
        top_k = [vocab_size if row.top_k == -1 else min(row.top_k, vocab_size) for row in params]
        return cls(
            temperature=np.array([min(row.temperature, MAX_TEMPERATURE) for row in params], dtype=np.float64),
            top_k=np.array(top_k, dtype=np.int64),
            top_p=np.array([row.top_p for row in params], dtype=np.float64),
            min_p=np.array([row.min_p for row in params], dtype=np.float64),
            top_n_sigma=np.array([min(row.top_n_sigma, MAX_SIGMAS) for row in params], dtype=np.float64),
            uniform=np.array([uniform(row.seed, row.position) for row in inputs], dtype=np.float64),
            **{name: np.array([getattr(row, name) for row in params], dtype=np.float64) for name in _UNUSUAL},
        )

    @property
    def needs_all(self) -> Booleans:
        """The rows whose truncation reads every token that `top_k` keeps."""
        return (self.typical_p < 1) | (self.dynatemp_range > 0)

    def take(self, rows: Integers | slice) -> RowSettings:
        """The settings of some of the rows, in that order."""
        return RowSettings._make(values[rows] for values in self)


def sample(
    rows: LogitRows, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None] = ()
) -> list[SampledToken | Undrawn]:
    """Draw one token for each row of `rows`, which are overwritten.

    A row's token and logprobs depend on its own logits, input and mask alone: the other rows, their number and their
    order change nothing. `masks` are complete and one a row, or empty.
    """
    if not inputs:
        return []
    token_ids, best = rows.best()
    is_finite = np.isfinite(best)
    reporting = np.array([row for row, entry in enumerate(inputs) if entry.params.logprobs is not None], dtype=np.int64)
    own = rows.take(reporting) if reporting.size else rows
    if any(_num_edited(entry) or entry.params.allowed_token_ids for entry in inputs) or any(
        mask is not None for mask in masks
    ):
        own = rows.copy() if reporting.size == len(rows) else own
        edit(rows, inputs, masks)
        token_ids, best = rows.best()
    is_usable = is_finite & (best > -np.inf)

    is_greedy = np.array([entry.params.is_greedy for entry in inputs], dtype=np.bool_)
    random = np.flatnonzero(is_usable & ~is_greedy)
    if random.size:
        settings = RowSettings.of([inputs[row] for row in random.tolist()], rows.vocab_size)
        token_ids[random] = _draw(rows.take(random), best[random], settings)

    logprobs: dict[int, TokenLogprob] = {}
    if reporting.size:
        wanted = [inputs[row].params.logprobs or 0 for row in reporting]
        found = token_logprobs(own, token_ids[reporting].tolist(), max(wanted))
        for row, full, num_top in zip(reporting.tolist(), found, wanted, strict=True):
            logprobs[row] = TokenLogprob(full.token_id, full.logprob, full.top[:num_top])
    return [
        SampledToken(token_id, logprobs.get(row))
        if is_usable[row]
        else (Undrawn.NOTHING_ALLOWED if is_finite[row] else Undrawn.NOT_FINITE)
        for row, token_id in enumerate(token_ids.tolist())
    ]


def token_logprobs(rows: LogitRows, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """The logprob of each row's target with those of its `num_top` best tokens, best first, ties by lower id.

    A row that is not finite gives a logprob of NaN and no alternatives.
    """
    target_ids, every_row = np.array(targets, dtype=np.int64), np.arange(len(targets))
    _, best = rows.best()
    with np.errstate(invalid="ignore", divide="ignore"):  # rows that are not finite
        log_sums = np.log(rows.block_sums(best, np.ones(len(rows))).sum(axis=1))
        chosen = _logprobs(rows.gather(every_row, target_ids)[:, None], best, log_sums)[:, 0]
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(targets)
    if num_top:
        num_top = min(num_top, rows.vocab_size)
        shortlist = rows.shortlist(num_top + _TIE_MARGIN)
        top_ids, values = shortlist.token_ids[:, :num_top], shortlist.values[:, :num_top]
        ties = np.flatnonzero(~shortlist.is_exact(np.full(len(targets), num_top)) & np.isfinite(best))
        if ties.size:  # more tokens tie at the border than the shortlist holds
            whole = rows.take(ties).shortlist(rows.vocab_size)
            top_ids[ties], values[ties] = whole.token_ids[:, :num_top], whole.values[:, :num_top]
        with np.errstate(invalid="ignore"):
            logprobs = _logprobs(values, best, log_sums)
        pairs = zip(np.isfinite(best), top_ids.tolist(), logprobs.tolist(), strict=True)
        tops = [tuple(zip(ids, row, strict=True)) if is_finite else () for is_finite, ids, row in pairs]
    return list(map(TokenLogprob, targets, np.where(np.isfinite(best), chosen, np.nan).tolist(), tops))


def edited(values: Logits, entry: SamplingInput, places: Sequence[Integers]) -> Logits:
    """The logits of the tokens that a request edits, after its bias, bans, penalties and costs.

    `places` are where in `values` the tokens of `logit_bias`, the banned, the counted and the costly are. A penalty
    first divides a positive logit by `repetition_penalty` and multiplies any other (tokens of prompt or output), then
    subtracts `presence_penalty` and count * `frequency_penalty` (tokens of the output). Results are clipped to the
    largest float32. A token at -inf stays there, with any bias or penalty.
    """
    params, (biased, banned, counted, costly) = entry.params, places
    values[biased] += np.array(list(params.logit_bias.values()), dtype=np.float32)
    values[banned] = -np.inf
    if counted.size:
        counts = np.frombuffer(entry.output_counts, dtype=np.int32)
        factor = np.float32(min(max(params.repetition_penalty, 1 / MAX_PENALTY), MAX_PENALTY))
        presence, frequency = (
            min(max(penalty, -MAX_PENALTY), MAX_PENALTY)
            for penalty in (params.presence_penalty, params.frequency_penalty)
        )
        cost = (presence * (counts > 0) + frequency * counts).clip(-FLOAT_MAX, FLOAT_MAX).astype(np.float32)
        old = values[counted]
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is clipped; non-finite rows give no token
            new = np.where(old > 0, old / factor, old * factor) - cost
        values[counted] = np.where(old == -np.inf, old, new.clip(-FLOAT_MAX, FLOAT_MAX))
    if costly.size:
        old = values[costly]
        with np.errstate(over="ignore", invalid="ignore"):
            new = (old - np.frombuffer(entry.costs, dtype=np.float32)).clip(-FLOAT_MAX, FLOAT_MAX)
        values[costly] = np.where(old == -np.inf, old, new)
    return values


def _num_edited(entry: SamplingInput) -> int:
    num_counted = len(entry.counted_token_ids) if entry.params.has_penalties else 0
    return len(entry.params.logit_bias) + len(entry.banned_token_ids) + num_counted + len(entry.cost_token_ids)


def edit(rows: LogitRows, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None] = ()) -> None:
    """Apply bias, bans, masks, penalties and costs to `rows`, in place. Only edited logits are copied to the host."""
    words = {row: np.frombuffer(mask.words, np.int32) for row, mask in enumerate(masks) if mask is not None}
    for row, entry in enumerate(inputs):
        if entry.params.allowed_token_ids:
            allowed = allowed_words(entry.params.allowed_token_ids, rows.vocab_size)
            words[row] = words[row] & allowed if row in words else allowed
    if words:
        rows.forbid(np.array(list(words)), np.stack(list(words.values())))
    work: list[tuple[SamplingInput, Integers, list[Integers]]] = []
    edited_rows = [row for row, entry in enumerate(inputs) if _num_edited(entry)]
    for row in edited_rows:
        entry = inputs[row]
        counted = np.frombuffer(entry.counted_token_ids if entry.params.has_penalties else b"", dtype=np.int32)
        costly = np.frombuffer(entry.cost_token_ids, dtype=np.int32)
        each_kind = list(entry.params.logit_bias), entry.banned_token_ids, counted, costly
        parts = [np.array(ids, dtype=np.int64) for ids in each_kind]
        token_ids, places = np.unique(np.concatenate(parts), return_inverse=True)
        work.append((entry, token_ids, np.split(places, np.cumsum([len(part) for part in parts[:-1]]))))
    if not work:
        return
    lengths = [len(token_ids) for _, token_ids, _ in work]
    row_of_each, id_of_each = np.repeat(edited_rows, lengths), np.concatenate([token_ids for _, token_ids, _ in work])
    old = np.split(rows.gather(row_of_each, id_of_each), np.cumsum(lengths)[:-1])
    new = [edited(values, entry, places) for values, (entry, _, places) in zip(old, work, strict=True)]
    rows.scatter(row_of_each, id_of_each, np.concatenate(new))


def _draw(rows: LogitRows, best: Logits, settings: RowSettings) -> Integers:
    """A token for each row: from a shortlist if one is long enough, else from the whole row."""
    is_open = settings.top_k == rows.vocab_size
    has_sigma = settings.top_n_sigma > 0
    is_cut = ~is_open | (settings.top_p < 1) | (settings.min_p > 0) | has_sigma
    is_cut |= settings.needs_all | (settings.xtc_probability > 0)
    token_ids = np.full(len(rows), -1, dtype=np.int64)
    floors = np.full(len(rows), -np.inf)
    needs_sigma = np.flatnonzero(has_sigma)
    if needs_sigma.size:
        sigmas = rows.take(needs_sigma).standard_deviations(best[needs_sigma])
        floors[needs_sigma] = best[needs_sigma].astype(np.float64) - settings.top_n_sigma[needs_sigma] * sigmas
    needs_mass = np.flatnonzero(is_open & (settings.top_p < 1) & ~has_sigma & ~settings.needs_all)
    masses = np.full(len(rows), np.nan)
    if needs_mass.size:
        sums = rows.take(needs_mass).block_sums(best[needs_mass], settings.temperature[needs_mass])
        masses[needs_mass] = sums.sum(axis=1)
    for size in (*SHORTLIST_SIZES, rows.vocab_size):
        is_suited = (settings.top_k < size) | is_open | (size == rows.vocab_size)
        left = np.flatnonzero(is_cut & is_suited & (token_ids == -1))
        if left.size and size <= rows.vocab_size:
            shortlist = rows.take(left).shortlist(size)
            drawn, is_settled = _draw_listed(shortlist, settings.take(left), masses[left], floors[left])
            token_ids[left[is_settled]] = drawn[is_settled]
    whole = np.flatnonzero(~is_cut)
    if whole.size:
        # Rows without truncation: draw a block first, then one of its tokens.
        some, peaks, chosen = rows.take(whole), best[whole], settings.take(whole)
        sums = some.block_sums(peaks, chosen.temperature)
        numbers, rest = invert_cdf(sums, chosen.uniform * sums.sum(axis=1))
        values = some.block(numbers).astype(np.float64)
        weights = np.exp((values - peaks.astype(np.float64)[:, None]) / chosen.temperature[:, None])
        within, _ = invert_cdf(weights, rest)
        token_ids[whole] = numbers * BLOCK_SIZE + within
    return token_ids


def _draw_listed(
    shortlist: Shortlist, settings: RowSettings, masses: Floats, floors: Floats
) -> tuple[Integers, Booleans]:
    """Draw a token for each row; the second array marks the rows for which the shortlist was long enough.

    `masses` holds the sum of exp((logit - best logit) / temperature) over the whole row, or NaN if it is not known.
    Tokens with a logit below `floors` are excluded.
    """
    values = shortlist.values.astype(np.float64)
    distances = values[:, :1] - values
    is_measured = (np.arange(values.shape[1]) < settings.top_k[:, None]) & (values >= floors[:, None])
    is_listed = shortlist.is_whole_row | ~is_measured[:, -1]  # all that top-k keeps is in the list
    temperature = _dynamic_temperature(distances, is_measured, settings)
    weights = np.exp(-distances / temperature[:, None])
    is_measured = _keep_typical(distances, weights, is_measured, settings.typical_p)
    masses = np.where(is_listed, (weights * is_measured).sum(axis=1), masses)
    has_mass = (settings.top_p >= 1) | ~np.isnan(masses)

    enough = np.where(settings.top_p < 1, settings.top_p * masses, np.inf)
    better_mass = np.pad((weights * is_measured).cumsum(axis=1)[:, :-1], ((0, 0), (1, 0)))
    least = settings.min_p * (weights * is_measured).max(axis=1)
    is_kept = is_measured & (better_mass < enough[:, None]) & (weights >= least[:, None])
    is_kept &= weights > 0  # masked tokens must not look like a long tail
    num_exact = np.where(is_kept.any(axis=1), is_kept.shape[1] - is_kept[:, ::-1].argmax(axis=1), 1)
    is_settled = has_mass & shortlist.is_exact(num_exact) & (is_listed | ~settings.needs_all)
    is_kept = _exclude_top(distances, weights, is_kept, settings)

    by_id = np.argsort(shortlist.token_ids, axis=1)
    kept_weights = np.take_along_axis(weights * is_kept, by_id, axis=1)
    picks, _ = invert_cdf(kept_weights, settings.uniform * kept_weights.sum(axis=1))
    entries = np.take_along_axis(by_id, np.minimum(picks, by_id.shape[1] - 1)[:, None], axis=1)
    token_ids: Integers = np.take_along_axis(shortlist.token_ids, entries, axis=1)[:, 0]
    return token_ids, is_settled


def _dynamic_temperature(distances: Floats, is_measured: Booleans, settings: RowSettings) -> Floats:
    """The temperature of each row. With a range it depends on the entropy of the measured tokens."""
    temperature: Floats = settings.temperature.copy()
    for row in np.flatnonzero(settings.dynatemp_range > 0).tolist():
        some = distances[row, is_measured[row] & (distances[row] < np.inf)]
        weights = np.exp(-some)
        entropy = np.log(weights.sum()) + (weights * some).sum() / weights.sum()
        share = min(max(entropy / np.log(len(some)), 0.0), 1.0) if len(some) > 1 else 0.0
        reach = settings.dynatemp_range[row]
        low, high = max(temperature[row] - reach, 0.0), temperature[row] + reach
        found = low + (high - low) * share ** settings.dynatemp_exponent[row]
        temperature[row] = min(max(found, MIN_TEMPERATURE), MAX_TEMPERATURE)
    return temperature


def _keep_typical(distances: Floats, weights: Floats, is_measured: Booleans, typical_p: Floats) -> Booleans:
    """The measured tokens that are nearest to the mean distance and hold `typical_p` of the mass."""
    for row in np.flatnonzero(typical_p < 1).tolist():
        is_possible = is_measured[row] & (weights[row] > 0)
        some, masses = distances[row, is_possible], weights[row, is_possible]
        off_center = np.abs(some - (masses * some).sum() / masses.sum())
        order = off_center.argsort(kind="stable")
        last = np.searchsorted(masses[order].cumsum(), typical_p[row] * masses.sum())
        is_measured[row, is_possible] = off_center <= off_center[order[min(last, len(order) - 1)]]
        is_measured[row, ~is_possible] = False
    return is_measured


def _exclude_top(distances: Floats, weights: Floats, is_kept: Booleans, settings: RowSettings) -> Booleans:
    """The tokens that XTC keeps in rows where it is drawn: no logit above the lowest that reaches the threshold."""
    for row in np.flatnonzero(settings.xtc_probability > 0).tolist():
        if another(settings.uniform[row]) < settings.xtc_probability[row]:
            kept = weights[row] * is_kept[row]
            is_top = is_kept[row] & (kept >= settings.xtc_threshold[row] * kept.sum())
            is_kept[row] &= distances[row] >= distances[row, is_top].max(initial=0.0)
    return is_kept


def _logprobs(values: Logits, best: Logits, log_sums: Floats) -> Logits:
    """Log-probabilities of logits [R, N]."""
    shifted = values.astype(np.float64) - best.astype(np.float64)[:, None]
    return (shifted - log_sums[:, None]).astype(np.float32)

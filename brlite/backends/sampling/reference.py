"""Chooses tokens on the host without torch: the order of things is that of `sampler.py`, and so are the tokens.

For engines that compute elsewhere and hand their logits out. Rows are drawn in float64. Knows no text, no model and
nothing of other steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from brlite.backends.sampling.random_numbers import Floats, Integers, invert_cdf
from brlite.backends.sampling.row_settings import MAX_PENALTY, RowSettings
from brlite.backends.torch.shortlist import SHORTLIST_SIZE, Shortlist, draw_from_shortlist
from brlite.engine.backend import SampledToken, SamplingInput, TokenMask
from brlite.outputs import TokenLogprob

Logits = npt.NDArray[np.float32]

FLOAT_MAX = float(np.finfo(np.float32).max)


def sample(
    logits: Logits, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None] = ()
) -> list[SampledToken | None]:
    """Draw one token for each row of `logits` [R, V], which are overwritten on the way.

    A row gives None if its logits hold NaN or +inf, or if every token is at -inf, banned or masked. A row's token and
    logprobs depend on its own logits, input and mask alone. `masks` are complete, one a row, or there is none at all.
    """
    own_logits = logits.copy() if any(entry.params.logprobs is not None for entry in inputs) else logits
    is_usable = np.isfinite(logits.max(axis=1))
    for row, (entry, mask) in enumerate(zip_longest(inputs, masks)):
        edit_row(logits[row], entry, mask)
    is_usable &= np.isfinite(logits.max(axis=1))

    token_ids = logits.argmax(axis=1)
    is_greedy = np.array([entry.params.is_greedy for entry in inputs], dtype=np.bool_)
    random = np.flatnonzero(is_usable & ~is_greedy)
    if random.size:
        token_ids[random] = _draw(
            logits[random], RowSettings.of([inputs[row] for row in random.tolist()], logits.shape[1])
        )
    return [
        SampledToken(token_id, _report(own_logits[row], token_id, inputs[row])) if is_usable[row] else None
        for row, token_id in enumerate(token_ids.tolist())
    ]


def token_logprobs(logits: Logits, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """The logprob of each row's target with those of its `num_top` best tokens, best first, ties by lower id.

    A row that is not finite gives logprobs that are not.
    """
    return [_logprob(row, target, num_top) for row, target in zip(logits, targets, strict=True)]


def edit_row(row: Logits, entry: SamplingInput, mask: TokenMask | None = None) -> None:
    """Bias, bans, mask and penalties, in place, on one row [V]: the counterpart of `penalties.edit_logits`."""
    params = entry.params
    if params.logit_bias:
        row[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), dtype=np.float32)
    if entry.banned_token_ids:
        row[list(entry.banned_token_ids)] = -np.inf
    if mask:
        bits = np.unpackbits(np.frombuffer(mask.words, np.uint8), bitorder="little")
        row[bits[: len(row)] == 0] = -np.inf
    if params.has_penalties and entry.counted_token_ids:
        token_ids = np.frombuffer(entry.counted_token_ids, dtype=np.int32)
        counts = np.frombuffer(entry.output_counts, dtype=np.int32)
        factor = np.float32(min(max(params.repetition_penalty, 1 / MAX_PENALTY), MAX_PENALTY))
        cost = _bounded(params.presence_penalty) * (counts > 0) + _bounded(params.frequency_penalty) * counts
        old = row[token_ids]
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is cut; rows that are not finite give None
            new = np.where(old > 0, old / factor, old * factor) - cost.clip(-FLOAT_MAX, FLOAT_MAX).astype(np.float32)
        row[token_ids] = np.where(old == -np.inf, old, new.clip(-FLOAT_MAX, FLOAT_MAX))


def _bounded(penalty: float) -> float:
    return min(max(penalty, -MAX_PENALTY), MAX_PENALTY)


def _draw(logits: Logits, settings: RowSettings) -> Integers:
    """A token for each row: from a shortlist where that settles it, else from the whole row."""
    vocab_size = logits.shape[1]
    is_cut = (settings.top_k < vocab_size) | (settings.top_p < 1) | (settings.min_p > 0)
    suits_shortlist = (settings.top_k < SHORTLIST_SIZE) | (settings.top_k == vocab_size)
    token_ids = np.full(len(logits), -1, dtype=np.int64)
    for size, rows in ((SHORTLIST_SIZE, is_cut & suits_shortlist), (vocab_size, is_cut)):
        left = np.flatnonzero(rows & (token_ids == -1))
        if left.size:
            some, their_settings = logits[left], settings.take(left)
            shortlist, masses = _take_best(some, size), _masses(some, their_settings)
            drawn, is_settled = draw_from_shortlist(shortlist, their_settings, masses)
            token_ids[left[is_settled]] = drawn[is_settled]
    whole = np.flatnonzero(~is_cut)
    if whole.size:
        weights = _weights(logits[whole], settings.take(whole))
        token_ids[whole], _ = invert_cdf(weights, settings.uniform[whole] * weights.sum(axis=1))
    return token_ids


def _weights(logits: Logits, settings: RowSettings) -> Floats:
    """exp((logit - best) / temperature) [R, V]."""
    values = logits.astype(np.float64)
    weights: Floats = np.exp((values - values.max(axis=1, keepdims=True)) / settings.temperature[:, None])
    return weights


def _masses(logits: Logits, settings: RowSettings) -> Floats:
    """What top-p measures against: the mass of the whole row where `top_k` is off, else NaN."""
    masses = np.full(len(logits), np.nan)
    rows = np.flatnonzero((settings.top_k == logits.shape[1]) & (settings.top_p < 1))
    if rows.size:
        masses[rows] = _weights(logits[rows], settings.take(rows)).sum(axis=1)
    return masses


def _take_best(logits: Logits, size: int) -> Shortlist:
    """The shortlist of `size` tokens, or of the whole row if that is shorter, of each row."""
    num_rows, vocab_size = logits.shape
    size = min(size, vocab_size)
    if size < vocab_size:
        token_ids = np.argpartition(-logits, size - 1, axis=1)[:, :size]
    else:
        token_ids = np.tile(np.arange(vocab_size), (num_rows, 1))
    values = np.take_along_axis(logits, token_ids, axis=1)
    order = np.lexsort((token_ids, -values), axis=1)
    return Shortlist(
        token_ids=np.take_along_axis(token_ids, order, axis=1),
        values=np.take_along_axis(values, order, axis=1),
        is_whole_row=size == vocab_size,
    )


def _report(row: Logits, token_id: int, entry: SamplingInput) -> TokenLogprob | None:
    num_top = entry.params.logprobs
    return None if num_top is None else _logprob(row, token_id, num_top)


def _logprob(row: Logits, target: int, num_top: int) -> TokenLogprob:
    values = row.astype(np.float64)
    best = values.max()
    if not np.isfinite(best):
        return TokenLogprob(target, float("nan"))
    logprobs = (values - best - np.log(np.exp(values - best).sum())).astype(np.float32)
    if not num_top:
        return TokenLogprob(target, float(logprobs[target]))
    order = np.argsort(-row, kind="stable")[:num_top]  # two logits that differ may have one logprob, rounded
    top = tuple(zip(order.tolist(), logprobs[order].tolist(), strict=True))
    return TokenLogprob(target, float(logprobs[target]), top)

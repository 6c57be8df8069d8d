"""Draws on a card, queued behind the step that gives their logits: greedy ones, and those by temperature, `top_k`,
`top_p` and `min_p`, as `backends/sampling/reference.py` has them.

The host makes all other draws (`candidates.py`). Weights are integers here, so that their sums are exact in any order:
a row's token does not depend on other rows. The host's draw from the same logits differs only if the random number is
within 2^-40 of a border between two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from brlite.backends.sampling.reference import RowSettings
from brlite.backends.torch.device import send
from brlite.engine.backend import SamplingInput, TokenMask

SHORTLIST = 256  # a row whose `top_k` is not above this needs no sorting
MAX_SCRATCH_ELEMENTS = 2**23  # logits processed at a time: 64 MiB for each tensor of 8-byte numbers


def can_draw(entry: SamplingInput, mask: TokenMask | None) -> bool:
    """Whether `draw` can make this draw."""
    params = entry.params
    is_edited = params.logit_bias or params.allowed_token_ids or params.has_penalties
    if entry.banned_token_ids or entry.cost_token_ids:
        return False
    if mask is not None or is_edited or params.logprobs is not None:
        return False
    is_unusual = params.typical_p < 1 or params.xtc_probability > 0 or params.dynatemp_range > 0
    return params.is_greedy or not (is_unusual or params.top_n_sigma > 0)


def draw(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """A token for each row of `logits` [R, V] float32, on their device: [R] int64, -1 where the row is not finite."""
    best, token_ids = logits.max(dim=1)
    vocab_size = logits.shape[1]
    rows_by_size: dict[int, list[int]] = {}
    for row, entry in enumerate(inputs):
        if not entry.params.is_greedy:
            rows_by_size.setdefault(_shortlist_size(entry, vocab_size), []).append(row)
    step = max(1, MAX_SCRATCH_ELEMENTS // vocab_size)
    for size, rows in rows_by_size.items():
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            settings = RowSettings.of([inputs[row] for row in some], vocab_size)
            columns = (some, settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.uniform)
            numbers = send(np.array(columns, np.float64), logits.device)
            index = numbers[0].long()
            drawn = _draw_random(logits.index_select(0, index), best.index_select(0, index), numbers[1:], size)
            token_ids.index_copy_(0, index, drawn)
    return torch.where(best - best == 0, token_ids, -1)  # not 0 for NaN and infinities; `isfinite` is four operators


def _shortlist_size(entry: SamplingInput, vocab_size: int) -> int:
    """How many of the best tokens must be sorted: none without truncation by rank, else 256 or all."""
    params = entry.params
    is_open = params.top_k == -1 or params.top_k >= vocab_size
    if is_open and params.top_p >= 1:
        return 0
    return min(SHORTLIST, vocab_size) if not is_open and params.top_k <= SHORTLIST else vocab_size


def _draw_random(logits: Tensor, best: Tensor, settings: Tensor, size: int) -> Tensor:
    """A token for each row of `logits` [N, V]. `settings` [5, N] are temperature, top_k, top_p, min_p and the random
    number; `size` is the length of the shortlist that they need."""
    temperature, top_k, top_p, min_p, uniform = settings.unsqueeze(2)
    vocab_size = logits.shape[1]
    shares = logits.double().sub_(best.double().unsqueeze(1)).div_(temperature).exp_()  # of the best token's
    is_likely = shares >= min_p
    weights = shares.mul_(2.0 ** (62 - vocab_size.bit_length())).long()  # [N, V]; the sum of a row is below 2^62
    if size:
        token_ids = _best_tokens(logits, size)
        listed = weights.gather(1, token_ids)
        listed.masked_fill_(torch.arange(size, device=logits.device) >= top_k, 0)
        cumulative = listed.cumsum(dim=1)
        enough = torch.where(top_p < 1, top_p * cumulative[:, -1:], math.inf)
        listed.masked_fill_(cumulative - listed >= enough, 0)
        weights = torch.zeros_like(weights).scatter_(1, token_ids, listed)
    cumulative = weights.masked_fill_(~is_likely, 0).cumsum(dim=1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniform * total).long(), total - 1)
    return (cumulative <= target).sum(dim=1).clamp_(max=vocab_size - 1)


def _best_tokens(logits: Tensor, size: int) -> Tensor:
    """The best `size` tokens [N, size] of each row, best first, the lowest ids first among equals.

    Logit and id are combined in one integer, so no two are equal.
    """
    last = logits.shape[1] - 1
    bits = (logits + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # integers in the same order as the floats
    keys = (ordered.long() << 32) + (last - torch.arange(last + 1, device=logits.device))
    best = keys.topk(size, dim=1).values if size < last + 1 else keys.sort(dim=1, descending=True).values
    return last - (best & 0xFFFFFFFF)

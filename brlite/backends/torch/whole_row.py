"""Draws from whole rows, for distributions too flat for a shortlist: exact, without a sort of the vocabulary.

The draw inverts the CDF in the order of token ids: first over the sums of blocks, then within one block. Truncation
finds the bin of a histogram that holds the last survivor and orders that bin alone. A row's numbers never depend on
which rows are computed beside it: blocks have a fixed size and histograms add integers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from brlite.backends.sampling.random_numbers import Floats, Integers, invert_cdf
from brlite.backends.sampling.row_settings import RowSettings

_MAX_SCRATCH_ELEMENTS = 2**21  # rows are taken a few at a time: bounded memory
_BLOCK_SIZE = 512
_BIN_SHIFT = 16  # a bin is the exponent and the first 7 bits of an fp32 distance: 128 bins per octave
_NUM_BINS = 2 ** (31 - _BIN_SHIFT)
_ONE = 2.0**40  # a weight of 1 in fixed point; a vocabulary of 2^22 such tokens still fits an int64
_UNREACHABLE = 2**63 - 1


def row_masses(logits: torch.Tensor, settings: RowSettings) -> Floats:
    """The sum of exp((logit - best logit) / temperature) of each row of `logits` [R, V]."""
    parts = [_block_sums(_weights(part, some)).sum(axis=1) for part, some in _chunks(logits, settings)]
    return np.concatenate(parts)


def draw_from_whole_rows(logits: torch.Tensor, settings: RowSettings) -> Integers:
    """Draw a token for each row of `logits` [R, V]."""
    return np.concatenate([_draw(part, some) for part, some in _chunks(logits, settings)])


def _chunks(logits: torch.Tensor, settings: RowSettings) -> Iterator[tuple[torch.Tensor, RowSettings]]:
    num_rows, vocab_size = logits.shape
    step = max(1, _MAX_SCRATCH_ELEMENTS // max(vocab_size, _NUM_BINS))
    for start in range(0, num_rows, step):
        yield logits[start : start + step], settings.take(slice(start, start + step))


def _draw(logits: torch.Tensor, settings: RowSettings) -> Integers:
    weights = _weights(logits, settings)
    _truncate(weights, logits, settings)
    sums = _block_sums(weights)
    blocks, rest = invert_cdf(sums, settings.uniform * sums.sum(axis=1))
    within, _ = invert_cdf(_block_weights(weights, blocks), rest)
    return blocks * _BLOCK_SIZE + within


def _weights(logits: torch.Tensor, settings: RowSettings) -> torch.Tensor:
    """exp((logit - best) / temperature) [R, V]: the best token weighs 1, so nothing overflows at any temperature."""
    temperature = torch.from_numpy(settings.temperature.astype(np.float32)).to(logits.device)
    return (logits - logits.amax(dim=1, keepdim=True)).div_(temperature[:, None]).exp_()


def _block_sums(weights: torch.Tensor) -> Floats:
    """Sums [R, B] of blocks of `_BLOCK_SIZE` tokens, the last one shorter."""
    num_blocks = weights.shape[1] // _BLOCK_SIZE
    whole, rest = weights.tensor_split([num_blocks * _BLOCK_SIZE], dim=1)
    sums = [whole.reshape(len(whole), num_blocks, _BLOCK_SIZE).sum(dim=2), rest.sum(dim=1, keepdim=True)]
    return torch.cat(sums, dim=1).cpu().numpy().astype(np.float64)


def _block_weights(weights: torch.Tensor, blocks: Integers) -> Floats:
    """One block of each row [R, _BLOCK_SIZE], filled up with zeros where it is the shorter last one."""
    columns = blocks[:, None] * _BLOCK_SIZE + np.arange(_BLOCK_SIZE)
    last = weights.shape[1] - 1
    index = torch.from_numpy(np.minimum(columns, last)).to(weights.device)
    found: Floats = weights.gather(1, index).cpu().numpy().astype(np.float64)
    return np.where(columns <= last, found, 0.0)


def _truncate(weights: torch.Tensor, logits: torch.Tensor, settings: RowSettings) -> None:
    """Set to 0, in place, the weights of the tokens that top-k, then top-p, then min-p exclude."""
    if (settings.top_k < weights.shape[1]).any():
        _keep_best(weights, logits, torch.ones_like(logits, dtype=torch.int64), settings.top_k)
    if (settings.top_p < 1).any():
        amounts = (weights * _ONE).to(torch.int64)
        enough = np.ceil(settings.top_p * amounts.sum(dim=1).cpu().numpy()).astype(np.int64)
        _keep_best(weights, logits, amounts, np.where(settings.top_p < 1, enough, _UNREACHABLE))
    if (settings.min_p > 0).any():
        min_p = torch.from_numpy(settings.min_p.astype(np.float32)).to(weights.device)
        weights *= weights >= min_p[:, None]


def _keep_best(weights: torch.Tensor, logits: torch.Tensor, amounts: torch.Tensor, enough: Integers) -> None:
    """Zero the weights of all but the fewest best tokens (ties by lower id) whose `amounts` add up to `enough`."""
    distances = (logits.amax(dim=1, keepdim=True) - logits).abs()  # -0.0 - 0.0 is -0.0, whose bits are no bin
    bins = distances.view(torch.int32) >> _BIN_SHIFT  # grows with the distance; equals share one
    last_bins, better = _find_last_bins(bins, amounts, torch.from_numpy(enough).to(logits.device))
    weights *= bins <= last_bins[:, None]

    rows, token_ids = (bins == last_bins[:, None]).nonzero(as_tuple=True)
    values, shares = logits[rows, token_ids], amounts[rows, token_ids]
    surplus = _surplus(rows.cpu().numpy(), values.cpu().numpy(), shares.cpu().numpy(), enough - better.cpu().numpy())
    excess = torch.from_numpy(surplus).to(logits.device)
    weights[rows[excess], token_ids[excess]] = 0.0


def _find_last_bins(
    bins: torch.Tensor, amounts: torch.Tensor, enough: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row the bin in which its amounts reach `enough`, and the amount in the bins before it."""
    histogram = torch.zeros(len(bins), _NUM_BINS, dtype=torch.int64, device=bins.device)
    cumulative = histogram.scatter_add_(1, bins.to(torch.int64), amounts).cumsum(dim=1)
    last_bins = (cumulative < enough[:, None]).sum(dim=1, dtype=torch.int32)
    before = cumulative.gather(1, (last_bins - 1).clamp(min=0).to(torch.int64)[:, None])[:, 0]
    return last_bins, before.masked_fill(last_bins == 0, 0)


def _surplus(rows: Integers, values: Floats, amounts: Integers, missing: Integers) -> Integers:
    """Which members of the rows' last bins, given in the order of row and id, come after `missing` is reached."""
    order = np.lexsort((-values, rows))  # stable: of equal values the lower id is first
    rows, amounts = rows[order], amounts[order]
    better = amounts.cumsum() - amounts
    first_of_row = np.searchsorted(rows, rows)
    surplus: Integers = order[better - better[first_of_row] >= missing[rows]]
    return surplus

"""The best few tokens of each row, on the host and in an order that ties cannot shake; and drawing among them.

A shortlist settles nearly every draw: realistic distributions keep a handful of tokens after truncation. It says so
itself when it cannot, and then `whole_row.py` draws the same token the long way. Knows no logits beyond its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from brlite.backends.sampling.random_numbers import Floats, Integers, invert_cdf
from brlite.backends.sampling.row_settings import RowSettings

if TYPE_CHECKING:
    import torch

SHORTLIST_SIZE = 256  # tokens: more than a usual `top_k`, and few enough to sort on the host

Booleans = npt.NDArray[np.bool_]


class Shortlist(NamedTuple):
    """Of each row the `size` highest values with their token ids [R, size], best first, ties by lower id."""

    token_ids: Integers
    values: npt.NDArray[np.float32]
    is_whole_row: bool

    def is_exact(self, lengths: Integers) -> Booleans:
        """Whether the first `lengths[row]` entries are certainly the best: no token left out ties with the last."""
        last = np.take_along_axis(self.values, lengths[:, None] - 1, axis=1)[:, 0]
        return (last > self.values[:, -1]) | self.is_whole_row


def take_best(values: torch.Tensor, size: int) -> Shortlist:
    """The shortlist of `size` tokens, or of the whole row if that is shorter, of each row of `values` [R, V]."""
    size = min(size, values.shape[1])
    best = values.topk(size, dim=1)
    host_values, token_ids = best.values.cpu().numpy(), best.indices.cpu().numpy()
    order = np.lexsort((token_ids, -host_values), axis=1)
    return Shortlist(
        token_ids=np.take_along_axis(token_ids, order, axis=1),
        values=np.take_along_axis(host_values, order, axis=1),
        is_whole_row=size == values.shape[1],
    )


def draw_from_shortlist(shortlist: Shortlist, settings: RowSettings, masses: Floats) -> tuple[Integers, Booleans]:
    """Draw a token for each row; the second array tells for which rows the shortlist was long enough to do so.

    `masses` holds the sum of exp((logit - best logit) / temperature) over the whole row, or NaN where `top_k` lies
    within the shortlist, whose own mass then counts.
    """
    values = shortlist.values.astype(np.float64)
    weights = np.exp((values - values[:, :1]) / settings.temperature[:, None])
    is_kept = _is_kept(weights, settings, masses) & (weights > 0)  # masked tokens must not look like a long tail

    by_id = np.argsort(shortlist.token_ids, axis=1)
    kept_weights = np.take_along_axis(weights * is_kept, by_id, axis=1)
    picks, _ = invert_cdf(kept_weights, settings.uniform * kept_weights.sum(axis=1))
    entries = np.take_along_axis(by_id, picks[:, None], axis=1)
    token_ids: Integers = np.take_along_axis(shortlist.token_ids, entries, axis=1)[:, 0]
    return token_ids, shortlist.is_exact(is_kept.sum(axis=1))


def _is_kept(weights: Floats, settings: RowSettings, masses: Floats) -> Booleans:
    """Which entries survive top-k, top-p and min-p: always the first few of a row, at least one."""
    in_top_k = np.arange(weights.shape[1]) < settings.top_k[:, None]
    masses = np.where(np.isnan(masses), (weights * in_top_k).sum(axis=1), masses)
    enough = np.where(settings.top_p < 1, settings.top_p * masses, np.inf)
    better_mass = np.pad(weights.cumsum(axis=1)[:, :-1], ((0, 0), (1, 0)))
    is_kept: Booleans = in_top_k & (better_mass < enough[:, None]) & (weights >= settings.min_p[:, None])
    return is_kept

"""Chooses the next token of each row of a step's logits.

The order of things, for each row by itself:

1. the logprobs that are reported are the model's own, taken before anything below;
2. `logit_bias`, banned tokens, masks, then the penalties (`penalties.py`);
3. a greedy row takes its best token, the lowest id among equals;
4. other rows divide by the temperature and truncate. `top_k` keeps that many best tokens, the lowest ids among equals;
   `top_p` keeps the fewest best of these that hold this share of their mass; `min_p` drops those that are less
   probable than this share of the best one;
5. one random number, a function of seed and position alone, picks among the survivors in the order of their ids.

Knows no text and no model, and nothing of other steps: there is no generator state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from brlite.backends.sampling.random_numbers import Floats, Integers
from brlite.backends.sampling.row_settings import RowSettings
from brlite.backends.torch.logprobs import token_logprobs
from brlite.backends.torch.penalties import edit_logits
from brlite.backends.torch.shortlist import SHORTLIST_SIZE, draw_from_shortlist, take_best
from brlite.backends.torch.whole_row import draw_from_whole_rows, row_masses
from brlite.engine.backend import SampledToken, SamplingInput, TokenMask
from brlite.outputs import TokenLogprob

__all__ = ["sample", "token_logprobs"]


def sample(
    logits: torch.Tensor, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None] = ()
) -> list[SampledToken | None]:
    """Draw one token for each row of `logits` [R, V] float32, which are overwritten on the way.

    A row gives None if its logits hold NaN or +inf, or if every token is at -inf, banned or masked. A row's
    token and logprobs depend on its own logits, input and mask alone: the other rows, their number and their order
    change nothing. `masks` are complete, one a row, or there is none at all.
    """
    reporting = [row for row, entry in enumerate(inputs) if entry.params.logprobs is not None]
    own_logits = logits[reporting]  # a copy
    is_finite = logits.amax(dim=1).isfinite()
    edit_logits(logits, inputs, masks)
    is_usable = (is_finite & logits.amax(dim=1).isfinite()).cpu().numpy()

    token_ids = np.full(len(inputs), -1, dtype=np.int64)
    is_greedy = np.array([entry.params.is_greedy for entry in inputs], dtype=np.bool_)
    greedy, random = np.flatnonzero(is_usable & is_greedy), np.flatnonzero(is_usable & ~is_greedy)
    token_ids[greedy] = _rows(logits, greedy).argmax(dim=1).cpu().numpy()
    token_ids[random] = _draw(
        _rows(logits, random), RowSettings.of([inputs[row] for row in random.tolist()], logits.shape[1])
    )

    logprobs = _report(own_logits, reporting, inputs, token_ids)
    return [SampledToken(int(t), logprobs.get(row)) if is_usable[row] else None for row, t in enumerate(token_ids)]


def _draw(logits: torch.Tensor, settings: RowSettings) -> Integers:
    """A token for each row: from its shortlist if that settles it, else from the whole row."""
    token_ids = np.full(len(logits), -1, dtype=np.int64)
    listed = np.flatnonzero(_suits_shortlist(settings, logits.shape[1]))
    if listed.size:
        some, some_settings = _rows(logits, listed), settings.take(listed)
        drawn, is_settled = draw_from_shortlist(
            take_best(some, SHORTLIST_SIZE), some_settings, _masses(some, some_settings)
        )
        token_ids[listed[is_settled]] = drawn[is_settled]
    left = np.flatnonzero(token_ids == -1)
    if left.size:
        token_ids[left] = draw_from_whole_rows(_rows(logits, left), settings.take(left))
    return token_ids


def _suits_shortlist(settings: RowSettings, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Rows whose survivors may all be among the best few. Decided by the row alone, never by its company."""
    is_open = settings.top_k == vocab_size
    is_cut = (settings.top_p < 1) | (settings.min_p > 0)
    suits: npt.NDArray[np.bool_] = (settings.top_k < SHORTLIST_SIZE) | (is_open & is_cut)
    return suits | (vocab_size <= SHORTLIST_SIZE)


def _masses(logits: torch.Tensor, settings: RowSettings) -> Floats:
    """What top-p measures against: the mass of the whole row where no `top_k` is set, else NaN."""
    masses = np.full(len(logits), np.nan)
    rows = np.flatnonzero((settings.top_k >= SHORTLIST_SIZE) & (settings.top_p < 1))
    if rows.size:
        masses[rows] = row_masses(_rows(logits, rows), settings.take(rows))
    return masses


def _rows(logits: torch.Tensor, rows: Integers) -> torch.Tensor:
    """Some rows of `logits`, without a copy if they are all of them."""
    if len(rows) == len(logits):
        return logits
    return logits[torch.from_numpy(rows).to(logits.device)]


def _report(
    own_logits: torch.Tensor, reporting: Sequence[int], inputs: Sequence[SamplingInput], token_ids: Integers
) -> dict[int, TokenLogprob]:
    """The logprobs of the rows that asked, by row."""
    wanted = [inputs[row].params.logprobs or 0 for row in reporting]
    if not wanted:
        return {}
    targets = [max(0, int(token_ids[row])) for row in reporting]  # a row without a token is never shown
    found = token_logprobs(own_logits, targets, max(wanted))
    return {
        row: TokenLogprob(full.token_id, full.logprob, full.top[:num_top])
        for row, full, num_top in zip(reporting, found, wanted, strict=True)
    }

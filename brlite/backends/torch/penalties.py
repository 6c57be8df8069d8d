"""Edits the logits of a step before tokens are drawn: `logit_bias`, banned tokens, masks, then the penalties.

Every edit but a mask is sparse: triples of row, token and number for all rows at once, so its cost is the number of
tokens that are touched and not the vocabulary. Knows no probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from brlite.backends.sampling.row_settings import MAX_PENALTY
from brlite.engine.backend import SamplingInput, TokenMask

FLOAT_MAX = torch.finfo(torch.float32).max


def edit_logits(logits: torch.Tensor, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None] = ()) -> None:
    """Apply bias, bans, masks and penalties to `logits` [R, V] in place.

    A penalty first divides a positive logit by `repetition_penalty` and multiplies any other (tokens of prompt or
    output), then subtracts `presence_penalty` and count * `frequency_penalty` (tokens of the output). What overflows
    stops at the largest fp32 number; a token that was at -inf stays there, whatever its bias or penalty.
    """
    _add_biases(logits, inputs)
    _ban(logits, inputs)
    _mask(logits, masks)
    _penalise(logits, inputs)


def _add_biases(logits: torch.Tensor, inputs: Sequence[SamplingInput]) -> None:
    biases = [(row, *item) for row, entry in enumerate(inputs) for item in entry.params.logit_bias.items()]
    if not biases:
        return
    rows, token_ids, values = zip(*biases, strict=True)
    logits[_cells(logits, rows, token_ids)] += torch.tensor(values, dtype=torch.float32, device=logits.device)


def _ban(logits: torch.Tensor, inputs: Sequence[SamplingInput]) -> None:
    bans = [(row, token_id) for row, entry in enumerate(inputs) for token_id in entry.banned_token_ids]
    if bans:
        logits[_cells(logits, *zip(*bans, strict=True))] = -torch.inf


def _mask(logits: torch.Tensor, masks: Sequence[TokenMask | None]) -> None:
    """The bits go to the device as they are, a 32nd of the logits' bytes, and are spread there."""
    present = [(row, mask.words) for row, mask in enumerate(masks) if mask is not None]
    if not present:
        return
    rows, words = zip(*present, strict=True)
    index = torch.tensor(rows, device=logits.device)
    bits = torch.from_numpy(np.stack([np.frombuffer(row, np.int32) for row in words])).to(logits.device)
    is_allowed = (bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1  # [R, V / 32, 32]
    is_out = is_allowed.reshape(len(rows), -1)[:, : logits.shape[1]] == 0
    logits[index] = logits[index].masked_fill(is_out, -torch.inf)


def _penalise(logits: torch.Tensor, inputs: Sequence[SamplingInput]) -> None:
    rows = [row for row, entry in enumerate(inputs) if entry.params.has_penalties and entry.counted_token_ids]
    if not rows:
        return
    token_ids = [np.frombuffer(inputs[row].counted_token_ids, dtype=np.int32) for row in rows]
    counts = np.concatenate([np.frombuffer(inputs[row].output_counts, dtype=np.int32) for row in rows])
    num_tokens = [len(ids) for ids in token_ids]

    def spread(name: str, low: float = -MAX_PENALTY) -> npt.NDArray[np.float64]:
        values = [getattr(inputs[row].params, name) for row in rows]
        return np.repeat(np.clip(np.array(values, dtype=np.float64), low, MAX_PENALTY), num_tokens)

    cells = _cells(logits, np.repeat(rows, num_tokens), np.concatenate(token_ids))
    factor = _to_device(spread("repetition_penalty", low=1 / MAX_PENALTY), logits)
    cost = _to_device(spread("presence_penalty") * (counts > 0) + spread("frequency_penalty") * counts, logits)
    old = logits[cells]
    new = torch.where(old > 0, old / factor, old * factor) - cost
    logits[cells] = torch.where(old == -torch.inf, old, new.clamp(-FLOAT_MAX, FLOAT_MAX))


def _cells(logits: torch.Tensor, rows: npt.ArrayLike, token_ids: npt.ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of the given (row, token) pairs."""
    row_index = torch.from_numpy(np.array(rows, dtype=np.int64)).to(logits.device)
    return row_index, torch.from_numpy(np.array(token_ids, dtype=np.int64)).to(logits.device)


def _to_device(values: npt.NDArray[np.float64], logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.clip(-FLOAT_MAX, FLOAT_MAX).astype(np.float32)).to(logits.device)

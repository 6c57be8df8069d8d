"""Log-probabilities as the model gave them: of chosen tokens, and of the best alternatives beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from brlite.outputs import TokenLogprob
from brlite.worker.shortlist import take_best

_MAX_SCRATCH_ELEMENTS = 2**20
_TIE_MARGIN = 16  # a few tokens more than asked for, so that a tie at the border rarely needs the whole row

TopLogprobs = tuple[tuple[int, float], ...]


def token_logprobs(logits: torch.Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """The logprob of each row's target with those of its `num_top` best tokens, best first, ties by lower id.

    `logits` [R, V] are only read, a few rows at a time. A row that is not finite gives logprobs that are not.
    """
    num_rows, vocab_size = logits.shape
    step = max(1, _MAX_SCRATCH_ELEMENTS // vocab_size)
    found: list[TokenLogprob] = []
    for start in range(0, num_rows, step):
        logprobs = torch.log_softmax(logits[start : start + step].float(), dim=1)
        found += _describe(logprobs, targets[start : start + step], min(num_top, vocab_size))
    return found


def _describe(logprobs: torch.Tensor, targets: Sequence[int], num_top: int) -> Iterator[TokenLogprob]:
    index = torch.tensor(targets, dtype=torch.int64, device=logprobs.device)[:, None]
    chosen = logprobs.gather(1, index)[:, 0].tolist()
    tops: list[TopLogprobs] = _top_logprobs(logprobs, num_top) if num_top else [()] * len(targets)
    return map(TokenLogprob, targets, chosen, tops)


def _top_logprobs(logprobs: torch.Tensor, num_top: int) -> list[TopLogprobs]:
    shortlist = take_best(logprobs, num_top + _TIE_MARGIN)
    token_ids, values = shortlist.token_ids[:, :num_top].tolist(), shortlist.values[:, :num_top].tolist()
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(token_ids, values, strict=True)]
    is_exact = shortlist.is_exact(np.full(len(tops), num_top))
    return [top if is_exact[row] else _slow_top(logprobs[row], num_top) for row, top in enumerate(tops)]


def _slow_top(logprobs: torch.Tensor, num_top: int) -> TopLogprobs:
    """The same for one row [V] where more tokens tie at the border than the shortlist holds."""
    values = logprobs.cpu().numpy()
    order = np.argsort(-values, kind="stable")[:num_top]
    return tuple(zip(order.tolist(), values[order].tolist(), strict=True))

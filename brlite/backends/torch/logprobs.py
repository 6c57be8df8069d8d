"""Log-probabilities as the model gave them: of chosen tokens, and of the best alternatives beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from brlite.backends.torch.shortlist import take_best
from brlite.outputs import TokenLogprob

_MAX_SCRATCH_ELEMENTS = 2**20
_TIE_MARGIN = 16  # a few tokens more than asked for, so that a tie at the border rarely needs the whole row

TopLogprobs = tuple[tuple[int, float], ...]


def token_logprobs(logits: torch.Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """The logprob of each row's target with those of its `num_top` best tokens, best first, ties by lower id.

    `logits` [R, V] are only read, a few rows at a time. A row that is not finite gives logprobs that are not. Sums are
    taken in float64: in float32 that of 300,007 terms is off by 4e-5 where torch adds them in eight lanes (AVX2).
    """
    num_rows, vocab_size = logits.shape
    step = max(1, _MAX_SCRATCH_ELEMENTS // vocab_size)
    found: list[TokenLogprob] = []
    for start in range(0, num_rows, step):
        some = logits[start : start + step].float()
        logprobs = torch.log_softmax(some.double(), dim=1).float()
        found += _describe(some, logprobs, targets[start : start + step], min(num_top, vocab_size))
    return found


def _describe(
    logits: torch.Tensor, logprobs: torch.Tensor, targets: Sequence[int], num_top: int
) -> Iterator[TokenLogprob]:
    index = torch.tensor(targets, dtype=torch.int64, device=logprobs.device)[:, None]
    chosen = logprobs.gather(1, index)[:, 0].tolist()
    tops = _top_logprobs(logits, logprobs, num_top) if num_top else [()] * len(targets)
    return map(TokenLogprob, targets, chosen, tops)


def _top_logprobs(logits: torch.Tensor, logprobs: torch.Tensor, num_top: int) -> list[TopLogprobs]:
    """Ordered by the logits: two that differ may have the same logprob once it is rounded."""
    shortlist = take_best(logits, num_top + _TIE_MARGIN)
    best = shortlist.token_ids[:, :num_top]
    for row in np.flatnonzero(~shortlist.is_exact(np.full(len(best), num_top))):
        # More tokens tie at the border than the shortlist holds.
        best[row] = np.argsort(-logits[row].cpu().numpy(), kind="stable")[:num_top]
    values = logprobs.gather(1, torch.from_numpy(best).to(logprobs.device)).tolist()
    return [tuple(zip(*pair, strict=True)) for pair in zip(best.tolist(), values, strict=True)]

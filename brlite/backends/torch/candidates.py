"""The sampler's queries of logits on a card: a few best tokens, sums, chosen logits. `backends/sampling` draws.

Sums are computed in float64, a few rows at a time. A row's numbers do not depend on other rows. For a card that runs
ahead, token masks and edits are queued behind the step: the host waits only where it reads an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brlite.backends.sampling import reference
from brlite.backends.sampling.host import choose_sampler
from brlite.backends.sampling.logits_processors import sample_processed
from brlite.backends.sampling.random_numbers import Floats, Integers
from brlite.backends.sampling.rows import BLOCK_SIZE, Logits, Shortlist, sorted_shortlist
from brlite.backends.torch.device import send
from brlite.engine.backend import LogitsProcessors, SampledToken, SamplingInput, TokenMask, Undrawn
from brlite.engine.outputs import TokenLogprob

_MAX_SCRATCH_ELEMENTS = 2**21


class TorchRows:
    """`LogitRows` on a device. `scatter` and `forbid` write into `logits` [R, V] float32."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @property
    def vocab_size(self) -> int:
        return self._logits.shape[1]

    def __len__(self) -> int:
        return len(self._logits)

    def take(self, rows: Integers) -> TorchRows:
        return self if len(rows) == len(self) else TorchRows(self._logits[self._index(rows)])

    def copy(self) -> TorchRows:
        return TorchRows(self._logits.clone())

    def best(self) -> tuple[Integers, Logits]:
        values, token_ids = self._logits.max(dim=1)
        return token_ids.cpu().numpy(), values.cpu().numpy()

    def gather(self, rows: Integers, token_ids: Integers) -> Logits:
        found: Logits = self._logits[self._index(rows), self._index(token_ids)].cpu().numpy()
        return found

    def scatter(self, rows: Integers, token_ids: Integers, values: Logits) -> None:
        self._logits[self._index(rows), self._index(token_ids)] = send(values, self._logits.device)

    def forbid(self, rows: Integers, words: npt.NDArray[np.int32]) -> None:
        """Queues a copy of the bits to the device, 1/32 of the logits' bytes, which expands them there."""
        device, index = self._logits.device, self._index(rows)
        bits = torch.arange(32, dtype=torch.int32, device=device)
        is_allowed = send(words, device)[:, :, None] >> bits & 1  # [N, V / 32, 32]
        is_out = is_allowed.reshape(len(rows), -1)[:, : self.vocab_size] == 0
        self._logits[index] = self._logits[index].masked_fill(is_out, -torch.inf)

    def shortlist(self, size: int) -> Shortlist:
        if size >= self.vocab_size:
            # Some devices sort the bits of floats: adding 0 turns -0 into 0.
            values, token_ids = (self._logits + 0.0).sort(dim=1, descending=True, stable=True)
            return Shortlist(token_ids.cpu().numpy(), values.cpu().numpy(), is_whole_row=True)
        values, token_ids = self._logits.topk(size, dim=1)
        return sorted_shortlist(token_ids.cpu().numpy(), values.cpu().numpy())

    def block_sums(self, best: Logits, temperature: Floats) -> Floats:
        step, num_whole = max(1, _MAX_SCRATCH_ELEMENTS // self.vocab_size), self.vocab_size // BLOCK_SIZE
        parts: list[Floats] = []
        for start in range(0, len(self), step):
            some = slice(start, start + step)
            best_of_row, temperature_of_row = (
                send(values[some].astype(np.float64), self._logits.device)[:, None] for values in (best, temperature)
            )
            weights = (self._logits[some].double() - best_of_row).div_(temperature_of_row).exp_()
            whole, rest = weights.tensor_split([num_whole * BLOCK_SIZE], dim=1)
            sums = [whole.reshape(len(whole), num_whole, BLOCK_SIZE).sum(dim=2), rest.sum(dim=1, keepdim=True)]
            parts.append(torch.cat(sums, dim=1).cpu().numpy())
        return np.concatenate(parts)

    def standard_deviations(self, best: Logits) -> Floats:
        found: list[float] = []
        for row, one_best in zip(self._logits, best.tolist(), strict=True):
            distances = (one_best - row.double())[row > -torch.inf]
            found.append(float(distances.var(correction=0).sqrt()))
        return np.array(found)

    def block(self, numbers: Integers) -> Logits:
        columns = numbers[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        found = self._logits.gather(1, self._index(np.minimum(columns, self.vocab_size - 1))).cpu().numpy()
        return np.where(columns < self.vocab_size, found, np.float32(-np.inf))

    def _index(self, values: Integers) -> Tensor:
        return send(np.ascontiguousarray(values, dtype=np.int64), self._logits.device)


class TorchSampler:
    """Draws from the logits of a step, on any device."""

    def __init__(self, vocab_size: int) -> None:
        self._on_host = choose_sampler(vocab_size)

    def sample(
        self, logits: Tensor, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None]
    ) -> list[SampledToken | Undrawn]:
        """Draw one token for each row of `logits` [R, V] float32, which are overwritten."""
        if logits.is_cpu:
            return self._on_host.sample(logits.numpy(), inputs, masks)
        return reference.sample(TorchRows(logits), inputs, masks)

    def sample_processed(
        self, logits: Tensor, entry: SamplingInput, mask: TokenMask | None, processors: LogitsProcessors
    ) -> SampledToken | Undrawn:
        """Draw the token of one sequence on the host, after its logits processors. `logits` are [V] float32."""
        return sample_processed(self._on_host, np.array(logits.cpu().numpy()), entry, mask, processors)

    def token_logprobs(self, logits: Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """The logprob of each row's target, with its `num_top` best alternatives."""
        if logits.is_cpu:
            return self._on_host.token_logprobs(logits.numpy(), targets, num_top)
        return reference.token_logprobs(TorchRows(logits), targets, num_top)

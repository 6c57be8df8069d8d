"""One step of a model in torch: runs of sequences in, hidden states and logits out. `Steps` is the interface.

`EagerSteps` calls torch's own operators one by one, on any device. `triton/steps.py` implements it with our kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from brlite.backends.torch.attention import Span, StepPlanner
from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import send
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parameters import Parameters
from brlite.models.config import ModelConfig


class Run(Protocol):
    """A run of one sequence's tokens to compute: fields of `ScheduledSeq`."""

    @property
    def start(self) -> int: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def block_table(self) -> list[int]: ...


@dataclass(frozen=True)
class ComputedStep:
    """`hidden` [T, H], with the first row of each run in `first_rows`. `logits` of the first rows of `hidden`, if they
    were computed as well."""

    first_rows: Sequence[int]
    hidden: Tensor
    logits: Tensor | None = None


class LastDraws(NamedTuple):
    """The draws of the previous step, `drawn` [R] int64 on the device, -1 where there is none, which counts as 0. The
    first token of a run is `drawn[source]` if its source is not -1."""

    drawn: Tensor
    sources: Sequence[int]


class StepLimits(NamedTuple):
    """The most `rows` of a step without a prompt, the most `tokens` of any step, and the `length` of a context."""

    rows: int
    tokens: int
    length: int


class Steps(Protocol):
    """Computes steps of one model with one cache. Nothing waits for the device."""

    config: ModelConfig
    parameters: Parameters
    cache: KVCache
    device: torch.device
    dtype: torch.dtype
    is_batch_invariant: bool

    def forward(self, runs: Sequence[Run], last: LastDraws | None = None) -> ComputedStep:
        """Compute the runs' tokens; store their keys and values. The previous step's result may be overwritten."""
        ...

    def logits(self, step: ComputedStep, rows: list[int]) -> Tensor:
        """The vocabulary's logits [R, V] in float32 of some rows of `hidden`. The caller may overwrite them."""
        ...

    def normed(self, step: ComputedStep, rows: list[int]) -> Tensor:
        """The final norm of some rows of `hidden`, in float32: the input of the head."""
        ...


class EagerSteps:
    """`Steps` by torch's operators."""

    is_batch_invariant = False  # torch chooses its kernels by the shapes of a step

    def __init__(self, decoder: Decoder, cache: KVCache, *, has_few_shapes: bool = False) -> None:
        self.config, self.parameters = decoder.config, decoder.parameters
        self.device, self.dtype = decoder.device, decoder.dtype
        self.cache = cache
        self._decoder = decoder
        self._planner = StepPlanner(decoder.config, cache, decoder.dtype, decoder.device, has_few_shapes=has_few_shapes)

    def forward(self, runs: Sequence[Run], last: LastDraws | None = None) -> ComputedStep:
        plan = self._planner.plan([Span(run.start, len(run.token_ids), run.block_table) for run in runs])
        token_ids = self._indices(plan.in_rows([run.token_ids for run in runs]))
        if last is not None:
            pairs = zip(plan.first_rows, last.sources, strict=True)
            rows, sources = zip(*[(row, source) for row, source in pairs if source >= 0], strict=True)
            token_ids.index_copy_(
                0, self._indices(rows), last.drawn.index_select(0, self._indices(sources)).clamp_(min=0)
            )
        return ComputedStep(plan.first_rows, self._decoder.forward(token_ids, plan, self.cache))

    def logits(self, step: ComputedStep, rows: list[int]) -> Tensor:
        index = self._indices(self._planner.filled(rows, rows[0]))
        return self._decoder.logits(step.hidden.index_select(0, index))[: len(rows)]

    def normed(self, step: ComputedStep, rows: list[int]) -> Tensor:
        return self._decoder.normed(step.hidden.index_select(0, self._indices(rows)))

    def _indices(self, values: Sequence[int]) -> Tensor:
        return send(np.array(values, np.int64), self.device)

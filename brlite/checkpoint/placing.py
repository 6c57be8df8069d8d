"""What a backend is asked to load, and the way of a checkpoint's tensors there: one at a time, each with its target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from brlite.checkpoint.checked_model import CheckedModel
from brlite.checkpoint.checkpoint import Checkpoint
from brlite.checkpoint.progress import Progress
from brlite.checkpoint.stored_tensor import StoredTensor
from brlite.config.options import EngineConfig, ModelSpec
from brlite.models.config import ModelConfig
from brlite.models.families.family import WeightTarget
from brlite.models.network import Parameter
from brlite.models.shards import Shard, ShardSlice, parameter_parts, rank_parameters
from brlite.precision import PRECISIONS, Precision


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that a backend needs to load a model, decided before any weight is read.

    `checkpoint` is open and `model` is what was checked of it. With a `shard` one rank's part is loaded. `packed_file`
    is where the packed weights of native code are, or will be written. `notes` go to the backend's `info`.
    """

    checkpoint: Checkpoint
    model: CheckedModel
    spec: ModelSpec
    engine: EngineConfig
    num_threads: int = 1
    shard: Shard | None = None
    packed_file: Path | None = None
    progress: Progress = Progress()
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        """The whole model's, also of a shard."""
        return self.model.config

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The decoder's parameters, of a shard as its rank holds them."""
        return self.model.parameters if self.shard is None else rank_parameters(self.model.config, self.shard)

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.spec.precision]


StoredPart = tuple[range, range | None] | None  # rows and columns of a checkpoint's tensor; None for all of it


def placing(plan: LoadPlan) -> Iterator[tuple[WeightTarget, StoredTensor]]:
    """Every tensor of the checkpoint that has a target, with it. Nothing of it has been read yet.

    For a shard only what its rank holds comes, in parts, with their targets in the rank's own parameters. The fraction
    that is done is reported each time the caller comes back for more.
    """
    targets: Mapping[str, list[tuple[StoredPart, WeightTarget]]]
    if plan.shard is None:
        targets = {name: [(None, target)] for name, target in plan.model.targets.items()}
    else:
        held = parameter_parts(plan.config, plan.shard)
        targets = {name: _held_parts(target, held[target.parameter]) for name, target in plan.model.targets.items()}
    total = sum(math.prod(target.shape) for parts in targets.values() for _, target in parts)
    num_placed = 0
    for tensor in plan.checkpoint.tensors():
        for part, target in targets.get(tensor.name, ()):
            placed = tensor if part is None else tensor.part(*part)
            if target.has_unit_rows:
                placed = msgspec.structs.replace(placed, has_unit_rows=True)
            yield target, placed
            del placed
            num_placed += math.prod(target.shape)
            plan.progress.report(num_placed / total)
        del tensor  # whose bytes may be in memory, before the next one is read


def _held_parts(target: WeightTarget, held: ShardSlice) -> list[tuple[StoredPart, WeightTarget]]:
    """What a rank holds of the tensor that has this target, and where in the rank's own parameter that goes."""
    parts: list[tuple[StoredPart, WeightTarget]] = []
    num_before = 0
    for rows in held.rows:
        first, stop = max(rows.start, target.start), min(rows.stop, target.start + target.shape[0])
        if first < stop:
            shape = (stop - first, *(target.shape[1:] if held.columns is None else [len(held.columns)]))
            own = WeightTarget(target.parameter, shape, num_before + first - rows.start, target.has_unit_rows)
            parts.append(((range(first - target.start, stop - target.start), held.columns), own))
        num_before += len(rows)
    return parts

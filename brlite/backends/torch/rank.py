"""A rank of a model on torch: a backend for its shard, and the group that connects it to the other ranks.

After `o` and `down` the ranks' products are summed, so the results of one rank and of several differ by rounding.
"""

from __future__ import annotations

from brlite.backends.distributed.messages import RankBatch
from brlite.backends.torch.backend import TorchBackend
from brlite.backends.torch.device import select_device
from brlite.backends.torch.group import TorchGroup
from brlite.checkpoint.placing import LoadPlan
from brlite.engine.backend import BackendInfo, Batch, StepResult


class TorchRank:
    """A `RankModel`."""

    def __init__(self, backend: TorchBackend, group: TorchGroup) -> None:
        self._backend = backend
        self._group = group

    @classmethod
    def load(cls, plan: LoadPlan) -> TorchRank:
        """Read the weights of the plan's shard and allocate its cache, on the first of the spec's devices."""
        assert plan.shard is not None
        group = TorchGroup(plan.shard, select_device(plan.engine.device, plan.spec.devices[0]))
        return cls(TorchBackend.load(plan, group), group)

    @property
    def info(self) -> BackendInfo:
        return self._backend.info

    def open(self, host: str) -> str:
        return self._group.open(host)

    def join(self, place: str) -> None:
        self._group.join(place)

    def execute(self, batch: Batch) -> StepResult:
        return self._backend.execute(batch)

    def follow(self, work: RankBatch) -> None:
        self._backend.follow(work)

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.close()
        self._backend.close()

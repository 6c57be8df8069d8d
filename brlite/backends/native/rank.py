"""One rank of a model in native code: a backend whose plan exchanges rows with the other ranks in shared memory.

No sum is split among ranks, so results have the same bits for any number of ranks.
"""

from __future__ import annotations

from contextlib import ExitStack

from brlite.backends.distributed.messages import RankBatch
from brlite.backends.native.backend import NativeBackend
from brlite.backends.native.library import NativeLibrary
from brlite.backends.native.step_rows import SharedRows, SharedSizes
from brlite.checkpoint.placing import LoadPlan
from brlite.engine.backend import BackendInfo, Batch, StepResult


class NativeRank:
    """A `RankModel`."""

    def __init__(self, backend: NativeBackend, shared: SharedRows) -> None:
        self._backend = backend
        self._shared = shared

    @classmethod
    def load(cls, library: NativeLibrary, plan: LoadPlan, file: int) -> NativeRank:
        """Load the weights of the plan's shard and allocate its cache. `file` is a descriptor of the shared memory."""
        with ExitStack() as opened:
            sizes = SharedSizes.of(plan)
            shared = SharedRows(library.functions, sizes, file)
            opened.callback(shared.close)
            return cls(NativeBackend(library, plan, shared=shared, opened=opened), shared)

    @property
    def info(self) -> BackendInfo:
        return self._backend.info

    def open(self, host: str) -> str:
        return ""

    def join(self, place: str) -> None:
        """Nothing to do: ranks wait for each other in memory that is already mapped."""

    def execute(self, batch: Batch) -> StepResult:
        return self._backend.execute(batch)

    def follow(self, work: RankBatch) -> None:
        self._backend.follow(work)

    def abort(self) -> None:
        self._shared.end_meeting()

    def close(self) -> None:
        self._backend.close()

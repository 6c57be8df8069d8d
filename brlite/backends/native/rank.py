"""One rank's part of a model in native code: a backend of its own, whose plan meets the others' in shared memory.

No sum is split among ranks, so all of them together say what one says, bit for bit.
"""

from __future__ import annotations

from contextlib import ExitStack

from brlite.backends.distributed.messages import RankBatch
from brlite.backends.native.backend import NativeBackend, max_rows
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
        """Read the weights of the plan's shard and make room for its cache. `file` is the memory that ranks share."""
        with ExitStack() as opened:
            sizes = SharedSizes.of(plan.config, max_rows(plan.spec, plan.engine))
            shared = SharedRows(library.functions, sizes, file)
            opened.callback(shared.close)
            return cls(NativeBackend(library, plan, shared=shared, opened=opened), shared)

    @property
    def info(self) -> BackendInfo:
        return self._backend.info

    def open(self, host: str) -> str:
        return ""

    def join(self, place: str) -> None:
        """They meet in memory, which is here already."""

    def execute(self, batch: Batch) -> StepResult:
        return self._backend.execute(batch)

    def follow(self, work: RankBatch) -> None:
        self._backend.follow(work)

    def abort(self) -> None:
        self._shared.end_meeting()

    def close(self) -> None:
        self._backend.close()

"""One rank's part of a model in native code: a backend of its own, whose plan meets the others' in shared memory.

No sum is split among ranks, so all of them together say what one says, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from brlite.backends.distributed.messages import RankBatch
from brlite.backends.native.backend import NativeBackend, max_rows
from brlite.backends.native.library import NativeLibrary
from brlite.backends.native.plan import RankContext
from brlite.backends.native.step_rows import SharedRows, SharedSizes
from brlite.checkpoint import Checkpoint
from brlite.checkpoint.checked_model import CheckedModel
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import BackendInfo, Batch, StepResult
from brlite.models.shards import Shard


class NativeRank:
    """A `RankModel`."""

    def __init__(self, backend: NativeBackend, shared: SharedRows) -> None:
        self._backend = backend
        self._shared = shared

    @classmethod
    def load(
        cls,
        library: NativeLibrary,
        checkpoint: Checkpoint,
        fit: CheckedModel,
        spec: ModelSpec,
        engine: EngineConfig,
        share: Shard,
        file: int,
        image: Path | None,
        on_progress: Callable[[float], None],
    ) -> NativeRank:
        """Read the rank's weights and make room for its cache. `file` is the memory that the ranks share."""
        with ExitStack() as opened:
            shared = SharedRows(library.functions, SharedSizes.of(fit.config, max_rows(spec, engine)), file)
            opened.callback(shared.close)
            seat = RankContext(share, shared)
            backend = NativeBackend.load(
                library, checkpoint, fit, spec, engine, image, on_progress, opened=opened, seat=seat
            )
        return cls(backend, shared)

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

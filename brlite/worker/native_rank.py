"""One rank's part of a model in native code: a backend of its own, whose plan meets the others' in shared memory.

No sum is split among ranks, so all of them together say what one says, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from brlite.checkpoint import Checkpoint
from brlite.config import EngineConfig, ModelSpec
from brlite.engine.backend import BackendInfo, Batch, StepResult
from brlite.kernels.library import NativeLibrary
from brlite.kernels.plan import Seat
from brlite.kernels.step_rows import SharedRows, SharedSizes
from brlite.models.sharing import Share
from brlite.worker.channel import Work
from brlite.worker.fit import Fit
from brlite.worker.native_backend import NativeBackend, max_rows


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
        fit: Fit,
        spec: ModelSpec,
        engine: EngineConfig,
        share: Share,
        file: int,
        image: Path | None,
        on_progress: Callable[[float], None],
    ) -> NativeRank:
        """Read the rank's weights and make room for its cache. `file` is the memory that the ranks share."""
        with ExitStack() as opened:
            shared = SharedRows(library.functions, SharedSizes.of(fit.config, max_rows(spec, engine)), file)
            opened.callback(shared.close)
            seat = Seat(share, shared)
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

    def follow(self, work: Work) -> None:
        self._backend.follow(work)

    def abort(self) -> None:
        self._shared.end_meeting()

    def close(self) -> None:
        self._backend.close()

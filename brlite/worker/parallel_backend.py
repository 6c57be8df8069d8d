"""A backend of several ranks: rank 0 computes its part here and sends every step to the others.

Knows how ranks are started, follow and fail, and nothing of how a part is computed: that is a `RankModel`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from brlite.engine.backend import BackendGuard, BackendInfo, Batch, StepResult
from brlite.errors import BackendLost
from brlite.worker.channel import Join, Joined, Loaded, Setup, Work, compute_frame, frame
from brlite.worker.ranks import OnLost, Ranks

logger = logging.getLogger(__name__)


class RankModel(Protocol):
    """One rank's part of a model, loaded. On rank 0 it is a `Backend`; other ranks `follow` it."""

    @property
    def info(self) -> BackendInfo: ...

    def open(self, host: str) -> str:
        """On rank 0: make the place where the ranks meet, on this address."""
        ...

    def join(self, place: str) -> None:
        """Return when all ranks are there."""
        ...

    def execute(self, batch: Batch) -> StepResult: ...

    def follow(self, work: Work) -> None:
        """Do this rank's part of a step that rank 0 executes."""
        ...

    def abort(self) -> None:
        """Another rank is gone: whoever waits for it in a step, on another thread, raises now or soon."""
        ...

    def close(self) -> None: ...


class ParallelBackend:
    """A `Backend`. Owns rank 0's model and the other ranks from its making to `close`.

    A rank that is gone, or a step that failed on one rank, ends it: `execute` raises `BackendLost` from then on, and
    whoever watches is told within moments, in a step or between two.
    """

    def __init__(self, model: RankModel, ranks: Ranks, info: BackendInfo) -> None:
        self.info = info
        self._model = model
        self._ranks = ranks
        self._on_lost: OnLost = _ignore
        self._lost: BackendLost | None = None
        self._guard = BackendGuard()
        self._lock = threading.Lock()  # the watch and a step may find a loss at the same time
        ranks.watch(self._note_lost)

    @classmethod
    def assemble(
        cls, ranks: Ranks, setup: Callable[[int], Setup], load: Callable[[], RankModel], describe: Describe, host: str
    ) -> ParallelBackend:
        """Have all ranks load, rank 0 here, and join. Takes the ranks over: they are ended where something fails."""
        model: RankModel | None = None
        try:
            ranks.tell_each(setup)
            model = load()
            loaded = ranks.hear(Loaded)
            place = model.open(host)
            ranks.tell(frame(Join(place)))
            model.join(place)
            ranks.hear(Joined)
            return cls(model, ranks, describe(model.info, loaded))
        except BaseException:
            ranks.close(at_once=True)
            if model is not None:
                model.close()
            raise

    def watch(self, on_lost: OnLost) -> None:
        """Call `on_lost`, on a thread of ours, should a rank go. To be called before the first step."""
        self._on_lost = on_lost

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step. Whatever is raised, the ranks are not in step any more, and the backend is lost."""
        with self._guard.step():
            return self._execute(batch)

    def close(self) -> None:
        """End the ranks and give back what rank 0 holds, after the step under way if there is one."""
        self._guard.close(self._give_back)

    def _execute(self, batch: Batch) -> StepResult:
        if self._lost is not None:
            raise self._lost
        try:
            self._ranks.tell(compute_frame(batch))
            return self._model.execute(batch)
        except Exception as error:
            raise self._lose(BackendLost(f"a step failed on rank 0: {error}")) from error

    def _give_back(self) -> None:
        self._ranks.close(at_once=self._lost is not None)
        self._model.close()

    def _note_lost(self, error: BackendLost) -> None:
        self._lose(error)

    def _lose(self, error: BackendLost) -> BackendLost:
        """Note the first reason, end the ranks that are left, and free whoever waits for them. Returns that reason."""
        with self._lock:
            if self._lost is not None:
                return self._lost
            self._lost = error
        logger.error("the ranks of the model are lost: %s", error)
        self._ranks.kill()
        self._model.abort()
        self._on_lost(error)
        return error


Describe = Callable[[BackendInfo, list[Loaded]], BackendInfo]


def _ignore(error: BackendLost) -> None:
    """Nobody watches."""

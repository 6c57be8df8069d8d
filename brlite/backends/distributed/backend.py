"""A backend of several ranks: rank 0 computes its part here and sends every step to the others.

Starts the ranks, sends them steps and handles their loss. A `RankModel` computes a part.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from brlite.backends.distributed.messages import Join, Joined, Loaded, RankBatch, Setup, compute_message
from brlite.backends.distributed.processes import CAUSE_SECONDS, OnLost, Ranks
from brlite.backends.guard import BackendGuard
from brlite.engine.backend import BackendInfo, Batch, StepResult, close_all
from brlite.errors import BackendLost, RankGone

logger = logging.getLogger(__name__)

Describe = Callable[[BackendInfo, list[Loaded]], BackendInfo]  # of rank 0 and of the others → of all together


class RankBackend(Protocol):
    """Computes one rank's part of a model. On rank 0 it is a `Backend`; on other ranks it follows that one."""

    @property
    def info(self) -> BackendInfo: ...

    def execute(self, batch: Batch) -> StepResult: ...

    def follow(self, work: RankBatch) -> None:
        """Do this rank's part of a step that rank 0 executes."""
        ...

    def close(self) -> None: ...


class RankConnection(Protocol):
    """Connects a rank with the others for the data that they exchange in a step."""

    def open(self, host: str) -> str:
        """On rank 0: open the place for exchanging data, at this address. Returns what `join` needs to find it."""
        ...

    def join(self, place: str) -> None:
        """Connect to the other ranks. Returns when all have joined."""
        ...

    def abort(self) -> None:
        """Another rank is lost: make a step that waits for it, on another thread, raise soon."""
        ...

    def close(self) -> None: ...


class RankModel(NamedTuple):
    """One rank's part of a model, loaded."""

    backend: RankBackend
    connection: RankConnection

    def close(self) -> None:
        close_all([self.backend, self.connection])


class ParallelBackend:
    """A `Backend`. Owns rank 0's model and the other ranks from its making to `close`.

    A rank that is gone, or a step that failed on one rank, ends it: `execute` raises `BackendLost` from then on, and
    the watcher is called within moments, in a step or between two.

    A step may fail on several ranks, at different times. The reported reason does not depend on the order: rank 0's own
    failure, else the failure of another rank. A lost connection to another rank is no failure of rank 0.
    """

    def __init__(self, model: RankModel, ranks: Ranks, info: BackendInfo) -> None:
        self.info = info
        self._model = model
        self._ranks = ranks
        self._on_lost: OnLost = lambda error: None
        self._lost: BackendLost | None = None
        self._guard = BackendGuard()
        self._lock = threading.Lock()  # the watch and a step may find a loss at the same time
        self._end_reason: BackendLost | None = None  # why another rank ended
        self._has_ended = threading.Event()
        self._is_between_steps = threading.Event()
        self._is_between_steps.set()
        ranks.watch(self._note_lost)

    @classmethod
    def assemble(
        cls, ranks: Ranks, setup: Callable[[int], Setup], load: Callable[[], RankModel], describe: Describe, host: str
    ) -> ParallelBackend:
        """Load the parts of all ranks, rank 0's here, and connect them. Owns `ranks`: ends them if anything fails."""
        model: RankModel | None = None
        try:
            ranks.send_each(setup)
            model = load()
            loaded = ranks.receive(Loaded)
            place = model.connection.open(host)
            ranks.send(Join(place))
            model.connection.join(place)
            ranks.receive(Joined)
            return cls(model, ranks, describe(model.backend.info, loaded))
        except BaseException as error:
            loss = ranks.find_loss() if isinstance(error, RankGone) else None
            ranks.close(at_once=True)
            if model is not None:
                model.close()
            if loss is not None:
                raise loss from error
            raise

    def watch(self, on_lost: OnLost) -> None:
        """Call `on_lost` once when a rank is lost, on another thread; at once and here if one is lost already."""
        with self._lock:
            self._on_lost = on_lost
            lost = self._lost
        if lost is not None:
            on_lost(lost)

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step. After any exception the ranks are no longer synchronized, and the backend is lost."""
        with self._guard.step():
            if self._lost is not None:
                raise self._lost
            self._is_between_steps.clear()
            try:
                self._ranks.send(compute_message(batch))
                return self._model.backend.execute(batch)
            except Exception as error:
                reason = BackendLost(f"a step failed on rank 0: {error}")
                if isinstance(error, RankGone) and self._has_ended.wait(CAUSE_SECONDS):
                    reason = self._end_reason or reason
                raise self._lose(reason) from error
            finally:
                self._is_between_steps.set()

    def close(self) -> None:
        """End the ranks and release rank 0's memory, after the running step if there is one."""

        def release() -> None:
            self._ranks.close(at_once=self._lost is not None)
            self._model.close()

        self._guard.close(release)

    def _note_lost(self, error: BackendLost) -> None:
        """Another rank has ended: abort the running step. If rank 0 failed by itself, that is reported."""
        self._end_reason = error
        self._has_ended.set()
        self._end_others()
        self._is_between_steps.wait(CAUSE_SECONDS)
        self._lose(error)

    def _lose(self, error: BackendLost) -> BackendLost:
        """Record the reason and end the other ranks, so that no step waits for them. Returns the first reason."""
        with self._lock:
            if self._lost is not None:
                return self._lost
            self._lost = error
            on_lost = self._on_lost
        logger.error("the ranks of the model are lost: %s", error)
        self._end_others()
        on_lost(error)
        return error

    def _end_others(self) -> None:
        self._ranks.kill()
        self._model.connection.abort()

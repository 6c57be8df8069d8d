"""Toys that claim more than the toy does, and toys that are broken, each in one way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from brlite.backends.plugins.contract import Capabilities, PluginRow, RowRefused
from brlite.backends.plugins.toy import ToyEngine
from brlite.config.options import EngineConfig, ModelSpec

SPEC = ModelSpec(name="toy", build_seq=96, build_batch=3)
CONFIG = EngineConfig(name="toy")


class LooseToy(ToyEngine):
    """Takes rows in any company, and no more of them than have something to do."""

    claims: ClassVar[dict[str, Any]] = {"can_mix_rows": True, "can_prefill_together": True, "needs_every_slot": False}

    def capabilities(self, spec: ModelSpec) -> Capabilities:
        return msgspec.structs.replace(super().capabilities(spec), **self.claims)


class StiffToy(LooseToy):
    """Takes prompts whole only."""

    claims: ClassVar[dict[str, Any]] = {"can_chunk_prompts": False, "hidden_size": 0}


# Broken toys. Rows are computed one by one through `logits`, from what `compute` put into the slots.


class WrongWidth(ToyEngine):
    def step(self, rows):
        return super().step(rows)[:, :-1]


class HiddenFrozen(ToyEngine):
    """Hidden states that no token changes."""

    def hidden_states(self, slots):
        return np.ones_like(super().hidden_states(slots))


class HiddenOfAnotherForm(ToyEngine):
    def hidden_states(self, slots):
        return super().hidden_states(slots).astype(np.float64)


class WrongType(ToyEngine):
    def step(self, rows):
        return super().step(rows).astype(np.float64)


class NotFinite(ToyEngine):
    def step(self, rows):
        return np.where(np.isclose(super().step(rows), 20.0), np.inf, super().logits(rows)).astype(np.float32)


class SameArray(ToyEngine):
    """Hands out its own buffer, and writes into it again."""

    _buffer: Any = None

    def step(self, rows):
        logits = super().step(rows)
        if self._buffer is None:
            self._buffer = logits
        self._buffer[:] = logits
        return self._buffer


class Forgetful(ToyEngine):
    """Does not look at the first token."""

    def logits(self, rows):
        kept = self._token_ids[:, 0].copy()
        self._token_ids[:, 0] = 0
        logits = super().logits(rows)
        self._token_ids[:, 0] = kept
        return logits


class Orderless(ToyEngine):
    """Does not see in which order tokens stand."""

    def logits(self, rows):
        kept = self._token_ids.copy()
        for row in rows:
            self._token_ids[row.slot, : row.end].sort()
        logits = super().logits(rows)
        self._token_ids[:] = kept
        return logits


class ShiftedDecodes(ToyEngine):
    """Writes a decode's token one place too late."""

    def compute(self, step):
        last = self._token_ids.shape[1] - 1
        is_decode = [start > 0 and length == 1 for start, length in zip(step.starts, step.lengths, strict=True)]
        starts = [min(start + shift, last) for start, shift in zip(step.starts, is_decode, strict=True)]
        super().compute(step._replace(starts=starts))


class LostChunks(ToyEngine):
    """Forgets the token before a chunk."""

    def compute(self, step):
        super().compute(step)
        for slot, _, start, length in zip(*step, strict=True):
            if start > 0 and length > 1:
                self._token_ids[slot, start - 1] = 0


class Moody(ToyEngine):
    """Adds something that changes from step to step."""

    def step(self, rows):
        return super().step(rows) + np.float32(1e-4 * self._num_steps)


class SlotsDiffer(ToyEngine):
    def step(self, rows):
        return super().step(rows) + np.arange(len(rows), dtype=np.float32)[:, None] * np.float32(1e-3)


class Leaky(ToyEngine):
    """What other slots hold shows, by a rounding error."""

    def step(self, rows):
        return super().step(rows) * np.float32(1 + 1e-6 * np.count_nonzero(self._slots.lengths))


class PaddingCounts(ToyEngine):
    """Reads every slot to the length of the longest."""

    def logits(self, rows):
        longest = max(row.end for row in rows)
        rows = [row._replace(start=longest - len(row.token_ids)) if len(row.token_ids) else row for row in rows]
        return super().logits(rows)


class WritesPadding(ToyEngine):
    """Writes a padding token into slots that have nothing to do."""

    def compute(self, step):
        super().compute(step)
        for slot, length in zip(step.slots, step.lengths, strict=True):
            if length == 0 and self._slots.lengths[slot]:
                self._token_ids[slot, self._slots.lengths[slot] - 1] = 0


class SortsRows(LooseToy):
    """Gives logits in the order of slots, whatever was asked for."""

    def step(self, rows):
        return super().step(sorted(rows))


class MixesUp(LooseToy):
    """Spoils a decode beside a prompt."""

    def step(self, rows):
        logits = super().step(rows)
        if any(row.is_prompt for row in rows):
            for index, row in enumerate(rows):
                logits[index] += not row.is_prompt
        return logits


class OnePromptOnly(LooseToy):
    """Computes the first prompt of a step."""

    def step(self, rows):
        logits = super().step(rows)
        logits[1:] = [logits[0] if row.is_prompt else each for row, each in zip(rows[1:], logits[1:], strict=True)]
        return logits


class RemembersWhatWas(ToyEngine):
    """Lets what was in a slot before show in what comes there next."""

    _ghosts: Any = None

    def release(self, slot):
        if self._ghosts is None:
            self._ghosts = {}
        self._ghosts[slot] = self._ghosts.get(slot, 0) + self._slots.lengths[slot]
        super().release(slot)

    def step(self, rows):
        ghosts = self._ghosts or {}
        return super().step(rows) + np.float32([[1e-3 * (ghosts.get(row.slot, 0) > 30)] for row in rows])


class ReleasesAll(ToyEngine):
    """Empties its neighbours with a slot."""

    def release(self, slot):
        super().release(slot)
        self._token_ids[:] = 0


class ReleasesOnce(ToyEngine):
    """Complains about a release of what is empty already, once something was in it."""

    def release(self, slot):
        if not self._slots.lengths[slot] and self._token_ids[slot].any():
            raise ValueError(f"slot {slot} is free already")
        self._slots.release(slot)


class Boundless(ToyEngine):
    """Takes one token more than a slot holds, and wraps around."""

    def step(self, rows):
        if any(row.end > self._token_ids.shape[1] for row in rows):
            return np.zeros((len(rows), 260), np.float32)
        return super().step(rows)


class Credulous(ToyEngine):
    """Takes any row for right."""

    def step(self, rows):
        try:
            return super().step(rows)
        except RowRefused as error:
            if "would hold" in str(error):
                raise
            return np.zeros((len(rows), 260), np.float32)


class RefusesOddly(ToyEngine):
    def step(self, rows):
        try:
            return super().step(rows)
        except RowRefused as error:
            raise IndexError(str(error)) from None


class ComputesThenRefuses(ToyEngine):
    """Computes the rows that are right before it refuses the step."""

    def step(self, rows):
        try:
            return super().step(rows)
        except RowRefused:
            for row in rows:
                if len(row.token_ids) and row.start == self._slots.lengths[row.slot]:
                    self._token_ids[row.slot, row.start - 1] = 0
            raise


class ChangesWithEachStart(ToyEngine):
    _num_opened = 0

    def open(self, spec, config):
        type(self)._num_opened += 1
        return super().open(spec, config)

    def step(self, rows):
        return super().step(rows) + np.float32(1e-3 * type(self)._num_opened)


class ClosesOnce(ToyEngine):
    def close(self):
        if self._slots is None:
            raise RuntimeError("closed already")
        super().close()


# Each check, by its name, with toys that must not pass it.
BROKEN: dict[str, Sequence[type[ToyEngine]]] = {
    "logits have their form": (WrongWidth, WrongType),
    "logits are finite": (NotFinite,),
    "logits stay as they are": (SameArray,),
    "every token counts": (Forgetful, Orderless),
    "hidden states are those of the last token": [HiddenOfAnotherForm, HiddenFrozen],
    "decodes continue prompts": (ShiftedDecodes,),
    "chunks equal the whole": (LostChunks,),
    "the same again": (Moody,),
    "slots are alike": (SlotsDiffer,),
    "slots are isolated": (Leaky, PaddingCounts),
    "ragged prompts do not mix": (PaddingCounts,),
    "idle slots keep what they hold": (WritesPadding,),
    "the order of rows is free": (SortsRows,),
    "prompts and decodes mix": (MixesUp,),
    "prompts come together": (OnePromptOnly,),
    "a released slot is clean": (RemembersWhatWas,),
    "a release leaves others alone": (ReleasesAll,),
    "a release may come at any time": (ReleasesOnce,),
    "a slot is filled and no further": (Boundless,),
    "what is wrong is refused": (Credulous, RefusesOddly),
    "a refusal changes nothing": (ComputesThenRefuses,),
    "it opens again as it was": (ChangesWithEachStart,),
    "it closes twice": (ClosesOnce,),
}


class Recorder(ToyEngine):
    """A toy that keeps what it was called with: (slot, start, tokens) of each row that has some."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[tuple[int, int, list[int]]]] = []
        self.num_rows: list[int] = []
        self.released: list[int] = []
        self.threads: list[int] = []

    def open(self, spec: ModelSpec, config: EngineConfig) -> Capabilities:
        self.threads.append(threading.get_ident())
        return super().open(spec, config)

    def step(self, rows: Sequence[PluginRow]) -> Any:
        self.threads.append(threading.get_ident())
        self.num_rows.append(len(rows))
        self.calls.append([(row.slot, row.start, row.token_ids.tolist()) for row in rows if len(row.token_ids)])
        return super().step(rows)

    def release(self, slot: int) -> None:
        self.threads.append(threading.get_ident())
        self.released.append(slot)
        super().release(slot)

    def close(self) -> None:
        self.threads.append(threading.get_ident())
        super().close()


class StiffRecorder(Recorder, StiffToy):
    """Both."""


class LooseRecorder(Recorder, LooseToy):
    """Both."""

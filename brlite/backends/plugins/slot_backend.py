"""`SlotBackend` makes a plug-in engine a `Backend`: one slot of the engine is one block of a whole context.

A sequence's only block is the number of its slot. Blocks are never shared, and a slot keeps its content until another
sequence gets it. Splits steps into the calls that the engine allows, and draws the tokens on the host.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from brlite.backends.guard import BackendGuard
from brlite.backends.plugins.calls import chunks, find_fault, plan_calls, with_every_slot
from brlite.backends.plugins.contract import Capabilities, GivesHiddenStates, PluginEngine, PluginRow
from brlite.backends.plugins.discovery import check_capabilities
from brlite.backends.plugins.one_thread import OneThread
from brlite.backends.pooling import add_states, pooled_result
from brlite.backends.sampling.host import choose_sampler
from brlite.backends.sampling.logits_processors import sample_processed
from brlite.backends.sampling.rows import Logits
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import (
    BackendInfo,
    Batch,
    SampledToken,
    SamplingInput,
    ScheduledSeq,
    SeqResult,
    StepResult,
    Undrawn,
)
from brlite.engine.outputs import TokenLogprob
from brlite.errors import BackendLost, EngineError

logger = logging.getLogger(__name__)

STEP_FAILED = "the model step failed; the request was not completed"

PREFIX_NOTE = "prompts that begin alike are each computed in full: a sequence has a slot of its own"
PROMPT_LOGPROBS_NOTE = "prompt_logprobs are refused: it takes prompts whole, and gives the logits of the last token"
FEWER_NOTE = "it has {name} {has}, and the config asks for {asked}"


@dataclass
class Slot:
    """The number of tokens that a slot holds, and the tokens that wait until their prompt is complete."""

    length: int = 0
    waiting: list[int] = field(default_factory=list)


@dataclass
class SlotWork:
    """A sequence of this step: its rows, computed one after the other, and their results."""

    seq: ScheduledSeq
    slot: int
    rows: list[PluginRow]
    logits: list[Logits] = field(default_factory=list)
    hidden: list[Logits] = field(default_factory=list)  # only for pooling
    error: str | None = None


class SlotBackend:
    """A `Backend`. Owns the engine, and the thread that all its calls come from, until `close`."""

    def __init__(self, engine: PluginEngine, spec: ModelSpec, config: EngineConfig) -> None:
        """Opens the engine, which may take minutes. Raises the engine's exceptions."""
        self._engine = engine
        self._guard = BackendGuard()
        self._thread = OneThread("brlite-engine-calls")
        try:
            self._capabilities = self._thread.call(lambda: engine.open(spec, config))
            check_capabilities(self._capabilities, spec)
            if self._capabilities.hidden_size and not isinstance(engine, GivesHiddenStates):
                raise EngineError(f"engine {self._capabilities.name} has a hidden_size, and no hidden_states")
            self._sampler = choose_sampler(self._capabilities.vocab_size)
        except Exception:  # not for Ctrl-C: closing would wait until the engine is open
            self.close()
            raise
        self.info = describe(self._capabilities, spec, config)
        self._slots = [Slot() for _ in range(self.info.num_blocks)]

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step. A call that fails ends its own sequences; if all calls fail, the last error is raised.

        `BackendLost` is raised at once.
        """
        with self._guard.step():
            work, failures = [self._take(seq) for seq in batch.seqs], list[Exception]()
            # The first rows of all sequences, then the second rows of those with more, and so on.
            for index in range(max((len(each.rows) for each in work), default=0)):
                rows = [each.rows[index] for each in work if index < len(each.rows) and each.error is None]
                for call in plan_calls(rows, self._capabilities):
                    if (error := self._call(call, work)) is not None:
                        failures.append(error)
            if failures and all(each.error is not None for each in work):
                raise failures[-1]
            for error in failures:
                logger.error("a call of engine %s failed; other sequences go on", self.info.name, exc_info=error)
            tokens = self._draw([each for each in work if each.error is None and each.rows], batch)
            return StepResult([self._result(each, tokens.get(each.slot)) for each in work])

    def close(self) -> None:
        """Close the engine and end its thread, after the step under way if there is one. May be called twice."""

        def release() -> None:
            if not self._thread.is_stopped:
                try:
                    self._thread.call(self._engine.close)
                finally:
                    self._thread.stop()

        self._guard.close(release)

    def _take(self, seq: ScheduledSeq) -> SlotWork:
        """Turn a sequence's tokens into rows. At position 0 the slot is emptied first: its last sequence has ended."""
        number = seq.block_table[0]
        slot = self._slots[number]
        if seq.start == 0:
            self._release(number)
        if slot.length + len(slot.waiting) != seq.start:
            held = slot.length + len(slot.waiting)
            raise EngineError(f"slot {number} holds {held} tokens, and the step goes on at {seq.start}")
        slot.waiting += seq.token_ids
        work = SlotWork(seq, number, [])
        if not self._capabilities.can_chunk_prompts and seq.sampling is None:
            return work  # more chunks of the prompt follow
        # Tokens whose logits or hidden states are wanted need rows of their own.
        num_single = len(seq.prompt_targets)
        if seq.pooling is not None and seq.pooling.num_tokens > 1:
            num_single = seq.pooling.num_tokens
        token_ids, start = np.array(slot.waiting, np.int32), slot.length
        pieces = [token_ids[index : index + 1] for index in range(num_single)]
        for piece in (*pieces, *chunks(token_ids[num_single:], self._capabilities)):
            work.rows.append(PluginRow(number, start, piece))
            start += len(piece)
        slot.waiting = []
        return work

    def _call(self, rows: list[PluginRow], work: Sequence[SlotWork]) -> Exception | None:
        """Call the engine once. Returns an exception that it raises, which ends the sequences of the call."""
        concerned = {each.slot: each for each in work}
        padded = with_every_slot(rows, self._capabilities)
        for row in rows:  # now: Ctrl-C ends the wait for the step, which is computed all the same
            self._slots[row.slot].length = row.end
        try:
            shape = len(padded), self._capabilities.vocab_size
            found = self._thread.call(lambda: self._engine.step(padded))
            logits = self._checked(found, "logits", self._capabilities.logits_dtype, shape)
            hidden: Sequence[Logits] | Logits = ()
            pooled = [row.slot for row in rows if concerned[row.slot].seq.pooling is not None]
            if pooled:
                shape = len(pooled), self._capabilities.hidden_size
                found = self._thread.call(lambda: self._engine.hidden_states(pooled))  # type: ignore[attr-defined]
                hidden = self._checked(found, "hidden states", "float32", shape)
        except BackendLost:
            raise
        except Exception as error:  # an engine is other people's code: any exception ends these rows only
            for row in rows:
                concerned[row.slot].error = STEP_FAILED
                self._release(row.slot, is_certain=True)
            return error
        for row, row_logits in zip(padded, logits, strict=True):
            if len(row.token_ids):
                concerned[row.slot].logits.append(row_logits)
        for number, state in zip(pooled, hidden, strict=True):
            concerned[number].hidden.append(state)
        return None

    def _checked(self, array: object, what: str, dtype: str, shape: tuple[int, int]) -> Logits:
        """The engine's array as float32. Raises `EngineError` for another type or shape than the engine promised."""
        if (fault := find_fault(array, dtype, shape)) is not None:
            raise EngineError(f"engine {self._capabilities.name}: {what} are {fault}")
        return np.ascontiguousarray(array, np.float32)

    def _release(self, number: int, *, is_certain: bool = False) -> None:
        """Empty a slot. The engine is called if the slot holds tokens, or with `is_certain` in any case."""
        slot = self._slots[number]
        if slot.length or is_certain:
            self._thread.call(lambda: self._engine.release(number))
        slot.length, slot.waiting = 0, []

    def _draw(self, work: Sequence[SlotWork], batch: Batch) -> dict[int, SampledToken | Undrawn]:
        """The next token of each sequence that wants one, by its slot."""
        drawing, processors = list[tuple[SlotWork, SamplingInput]](), batch.processors or {}
        tokens: dict[int, SampledToken | Undrawn] = {}
        if batch.masks is not None:
            batch.masks.wait()
        for each in work:
            seq, sampling = each.seq, each.seq.sampling
            if sampling is not None and seq.seq_id in processors:
                tokens[each.slot] = sample_processed(
                    self._sampler, each.logits[-1].copy(), sampling, batch.mask_of(seq.seq_id), processors[seq.seq_id]
                )
            elif sampling is not None:
                drawing.append((each, sampling))
        if drawing:
            logits = np.stack([each.logits[-1] for each, _ in drawing])
            masks = [batch.mask_of(each.seq.seq_id) for each, _ in drawing]
            found = self._sampler.sample(logits, [sampling for _, sampling in drawing], masks)
            tokens.update(zip((each.slot for each, _ in drawing), found, strict=True))
        return tokens

    def _result(self, work: SlotWork, token: SampledToken | Undrawn | None) -> SeqResult:
        seq, prompt_logprobs = work.seq, list[TokenLogprob]()
        if work.error is not None:
            return SeqResult(seq.seq_id, error=work.error)
        if isinstance(token, Undrawn):
            return SeqResult.undrawn(seq.seq_id, token)
        if seq.pooling is not None:
            states = np.stack(work.hidden[-seq.pooling.num_tokens :])
            return pooled_result(seq.seq_id, seq.pooling, add_states(seq.pooling, states))
        if seq.prompt_targets:
            logits = np.stack(work.logits[: len(seq.prompt_targets)])
            prompt_logprobs = self._sampler.token_logprobs(logits, seq.prompt_targets, seq.num_prompt_logprobs)
        if not all(math.isfinite(entry.logprob) for entry in prompt_logprobs):
            return SeqResult.undrawn(seq.seq_id, Undrawn.NOT_FINITE)
        return SeqResult(seq.seq_id, [] if token is None else [token], prompt_logprobs)


def describe(capabilities: Capabilities, spec: ModelSpec, config: EngineConfig) -> BackendInfo:
    """The engine's sizes as a `BackendInfo`. Its notes name configured features that the engine lacks."""
    max_seqs = min(capabilities.max_seqs, spec.build_batch)
    max_model_len = min(capabilities.max_model_len, spec.build_seq)
    notes = [*capabilities.notes]
    if config.prefix_caching:
        notes.append(PREFIX_NOTE)
    if not capabilities.can_chunk_prompts:
        notes.append(PROMPT_LOGPROBS_NOTE)
    for name, has, asked in (
        ("build_batch", capabilities.max_seqs, spec.build_batch),
        ("build_seq", capabilities.max_model_len, spec.build_seq),
    ):
        if has < asked:
            notes.append(FEWER_NOTE.format(name=name, has=has, asked=asked))
    return BackendInfo(
        name=capabilities.name,
        device=capabilities.device,
        dtype=capabilities.dtype,
        precision=spec.precision,
        vocab_size=capabilities.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=max_seqs,
        block_size=max_model_len,
        num_blocks=max_seqs,
        kv_dtype=capabilities.dtype,
        weight_bytes=capabilities.weight_bytes,
        kv_bytes=capabilities.kv_bytes,
        notes=tuple(f"engine {capabilities.name}: {note}" for note in notes),
        fingerprint=capabilities.fingerprint,
        is_batch_invariant=capabilities.is_batch_invariant,
        has_prompt_logprobs=capabilities.can_chunk_prompts,
        runs_logits_processors=True,
        hidden_size=capabilities.hidden_size,
        pooling=spec.pooling,
        matryoshka_dimensions=spec.matryoshka_dimensions,
    )

"""The backend in native code: packed weights, a paged cache, one library call per step. CPUs only, without torch.

The result of a row has the same bits for any other rows, chunk borders, cache hits and number of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice

import msgspec
import numpy as np
import numpy.typing as npt

from brlite.backends.distributed.messages import RankBatch, RankSeq, drawing_rows
from brlite.backends.guard import BackendGuard
from brlite.backends.native import abi
from brlite.backends.native.abi import LANES
from brlite.backends.native.adaptive_threads import AdaptiveThreads
from brlite.backends.native.draws import Drawing, DrawTarget, NativeDraws
from brlite.backends.native.library import NativeLibrary
from brlite.backends.native.nodes import BoundThread, rank_cpus
from brlite.backends.native.packer import Importance, PackedWeights, load_weights
from brlite.backends.native.plan import NO_SQUARES, NativePlan, PagedCache
from brlite.backends.native.step_rows import SharedRows, StepBuffers
from brlite.backends.pooling import pooled_result
from brlite.backends.sampling.host import NativeSampler
from brlite.backends.sampling.logits_processors import sample_processed
from brlite.checkpoint.load_plan import LoadPlan
from brlite.engine.backend import (
    MAX_DRAFT_TOKENS,
    BackendInfo,
    Batch,
    LogitsProcessors,
    ScheduledSeq,
    SeqResult,
    StepResult,
)
from brlite.errors import EngineError, RankGone
from brlite.models.rope_tables import inverse_frequencies
from brlite.process.machine import describe_cpu, find_nodes


class NativeBackend:
    """A `Backend`. Owns weights, cache, plan and threads until `close`. With a shard it is one rank."""

    def __init__(
        self,
        native: NativeLibrary,
        plan: LoadPlan,
        *,
        shared: SharedRows | None = None,
        opened: ExitStack | None = None,
        measure: Callable[[PackedWeights], Importance] | None = None,
        loaded: PackedWeights | None = None,
        squares: Mapping[str, int] = NO_SQUARES,
    ) -> None:
        """Load the weights, from their packed file if there is one, and allocate the cache.

        `shared` are the rows that the ranks of a sharded plan share. The backend owns `opened` and closes it last.
        `measure` is that of `load_weights`. `loaded` weights remain the caller's. `squares` are those of `NativePlan`.
        If anything is raised, KeyboardInterrupt included, everything is released.
        """
        library = native.functions
        device = f"cpu ({describe_cpu()}, {native.isa_name})"  # before the binding, which hides CPUs
        cpus = rank_cpus(plan.shard, plan.num_threads, find_nodes()) if plan.shard else None
        self._binding: AbstractContextManager[None] = BoundThread(cpus) if cpus else nullcontext()
        with opened or ExitStack() as opened, self._binding:
            weights = loaded or load_weights(library, plan, measure)
            if loaded is None:
                opened.callback(weights.close)
                weights.place()
            cache = PagedCache(library, plan)
            opened.callback(cache.close)
            self.info = _describe(native, device, plan, weights, cache)
            self._guard = BackendGuard()
            self._library = library
            self._vocab_size = plan.config.vocab_size
            self._hidden_size = plan.config.hidden_size
            self._draws = NativeDraws(self._vocab_size)
            self._host_sampler = NativeSampler(native, self._vocab_size)
            # Not with ranks: a rank also waits for others, so its times do not show whether its threads have cores.
            is_adaptive = plan.engine.adaptive_threads and plan.shard is None
            self._threads = AdaptiveThreads(plan.num_threads) if is_adaptive else None
            self._last_time = (ctypes.c_double * 2)()
            self._num_threads = plan.num_threads
            buffers = StepBuffers(library, plan, shared)
            opened.callback(buffers.close)
            self._plan = NativePlan(plan, weights, cache, buffers, squares)  # kept: the library reads its arrays
            struct = ctypes.addressof(self._plan.struct)
            self._engine: int = library.brlite_create(struct, native.isa, plan.num_threads) or 0
            if not self._engine:
                raise EngineError(f"no memory or threads for a native step on {plan.num_threads} threads")
            opened.callback(library.brlite_destroy, self._engine)
            self._open = opened.pop_all()

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step. After an exception the cache of other sequences is unchanged."""
        rows = _Rows(batch.seqs)
        runs = list(zip(batch.seqs, rows.first_rows, strict=True))
        drawings, processed = _drawings(batch, runs, self._vocab_size)
        targets = [
            DrawTarget(first + i, token_id, seq.num_prompt_logprobs)
            for seq, first in runs
            for i, token_id in enumerate(seq.prompt_targets)
        ]
        pooled = [(seq, first) for seq, first in runs if seq.pooling is not None]
        poolings = _Poolings(pooled, self._hidden_size) if pooled else None
        with self._guard.step():
            draws = self._draws.lay_out(drawings, targets)
            self._run(rows, draws.num_draws, draws.draws_address, draws.drawn_address, poolings=poolings)
            num_threads = self._num_threads
            # Waiting for a mask would count as threads without cores.
            if self._threads is not None and batch.masks is None:
                self._library.brlite_last_time(self._engine, ctypes.addressof(self._last_time))
                self._threads.observe(*self._last_time)
                self._num_threads = self._threads.num_threads
            drawn = draws.tokens()
            if processed and batch.masks is not None:
                batch.masks.wait()
            for index, processors in processed.items():
                _, sampling, _, mask, logits = drawings[index]
                assert logits is not None
                drawn[index] = sample_processed(self._host_sampler, logits, sampling, mask, processors)
            tokens, logprobs = iter(drawn), iter(draws.target_logprobs())
        totals = iter(() if poolings is None else poolings.totals)
        results = [
            SeqResult.of_draws(
                seq, list(islice(tokens, seq.num_draws)), list(islice(logprobs, len(seq.prompt_targets)))
            )
            if seq.pooling is None
            else pooled_result(seq.seq_id, seq.pooling, next(totals))
            for seq in batch.seqs
        ]
        return StepResult(results, num_threads)

    def follow(self, work: RankBatch) -> None:
        """Compute this rank's part of a step that rank 0 executes: everything but the draws."""
        rows = _Rows(work.seqs)
        runs = list(zip(work.seqs, rows.first_rows, strict=True))
        drawn = [row for seq, first in runs for row in drawing_rows(seq, first)]
        targets = [first + i for seq, first in runs for i in range(len(seq.prompt_targets))]
        draws = (abi.Draw * (len(drawn) + len(targets)))()
        for row, draw in zip((*drawn, *targets), draws, strict=True):
            draw.row = row
        with self._guard.step():
            self._run(rows, len(draws), ctypes.addressof(draws), 0)

    def last_logits(self, seqs: Sequence[ScheduledSeq]) -> npt.NDArray[np.float32]:
        """Compute a step without draws. Returns the logits [R, V] after the last token of each sequence."""
        rows = _Rows(seqs)
        last = [first + len(seq.token_ids) - 1 for seq, first in zip(seqs, rows.first_rows, strict=True)]
        return self._row_logits(rows, last)

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The logits [T, V] at every position of one prompt. For measurements: overwrites the first blocks."""
        num_blocks = math.ceil(len(token_ids) / self.info.block_size)
        rows = _Rows([ScheduledSeq(0, 0, list(token_ids), list(range(num_blocks)))])
        return self._row_logits(rows, range(len(token_ids)))

    def close(self) -> None:
        """Release threads and memory, after the running step if there is one. May be called twice."""
        self._guard.close(self._open.close)

    def _row_logits(self, rows: _Rows, wanted: Sequence[int]) -> npt.NDArray[np.float32]:
        """Run a step and return the logits of the `wanted` rows."""
        out = np.empty((len(wanted), self._vocab_size), np.float32)
        draws, drawn = (abi.Draw * len(wanted))(), (abi.Drawn * len(wanted))()
        for row, draw, logits in zip(wanted, draws, out, strict=True):
            draw.row, draw.target, draw.num_logprobs, draw.logits = row, 0, -1, logits.ctypes.data
        with self._guard.step():
            self._run(rows, len(draws), ctypes.addressof(draws), ctypes.addressof(drawn))
        return out

    def _run(self, rows: _Rows, num_draws: int, draws: int, drawn: int, poolings: _Poolings | None = None) -> None:
        """Call it only inside `guard.step`; otherwise `close` could release memory that the library reads."""
        batch = abi.NativeBatch(
            num_rows=rows.num_rows,
            num_spans=len(rows.spans),
            num_draws=num_draws,
            num_threads=self._num_threads,
            token_ids=rows.token_ids,
            spans=ctypes.addressof(rows.spans),
            draws=draws,
            drawn=drawn,
        )
        if poolings is not None:
            batch.poolings, batch.num_poolings = ctypes.addressof(poolings.structs), len(poolings.structs)
        with self._binding:
            error = self._library.brlite_run(self._engine, ctypes.addressof(batch))
        if error == abi.LOST_RANK:
            raise RankGone("another rank was lost during a step")
        if error:
            raise EngineError(f"the native step refused its batch: error {error}")


class _Rows:
    """A batch as the arrays that the library reads: tokens by row, spans, block tables."""

    def __init__(self, seqs: Sequence[ScheduledSeq | RankSeq]) -> None:
        token_ids, tables = array("i"), array("i")
        offsets: list[int] = []
        self.first_rows: list[int] = []
        for seq in seqs:
            self.first_rows.append(len(token_ids))
            offsets.append(len(tables) * tables.itemsize)
            token_ids.extend(seq.token_ids)
            tables.extend(seq.block_table)
        self._kept = token_ids, tables  # what the addresses point to
        self.num_rows = len(token_ids)
        self.token_ids, address = (each.buffer_info()[0] for each in self._kept)
        runs = zip(seqs, self.first_rows, offsets, strict=True)
        self.spans = (abi.NativeSpan * len(seqs))(
            *(abi.NativeSpan(seq.start, first, len(seq.token_ids), 0, address + offset) for seq, first, offset in runs)
        )


def _drawings(
    batch: Batch, runs: Sequence[tuple[ScheduledSeq, int]], vocab_size: int
) -> tuple[list[Drawing], dict[int, LogitsProcessors]]:
    """The tokens to draw after `runs`, each with its first row; by a token's index its logits processors, if any."""
    drawings: list[Drawing] = []
    processed: dict[int, LogitsProcessors] = {}
    for seq, first in runs:
        if (sampling := seq.sampling) is None:
            continue
        logits = None
        if batch.processors is not None and seq.seq_id in batch.processors:
            processed[len(drawings)] = batch.processors[seq.seq_id]
            logits = np.empty(vocab_size, np.float32)
        drawings += [
            Drawing(row, sampling, sampling.position + i, batch.mask_of(seq.seq_id, i), logits)
            for i, row in enumerate(drawing_rows(seq, first))
        ]
    return drawings, processed


class _Poolings:
    """Sums of hidden states that a step adds to, for sequences with their first rows. Keep it until the step ends."""

    def __init__(self, pooled: Sequence[tuple[ScheduledSeq, int]], hidden_size: int) -> None:
        self.totals = np.zeros((len(pooled), hidden_size), np.float64)
        self.structs = (abi.Pooling * len(pooled))()
        for (seq, first), total, struct in zip(pooled, self.totals, self.structs, strict=True):
            assert seq.pooling is not None
            if seq.pooling.total:
                total[:] = np.frombuffer(seq.pooling.total, np.float64)
            struct.first_row = first + len(seq.token_ids) - seq.pooling.num_tokens
            struct.num_rows, struct.total = seq.pooling.num_tokens, total.ctypes.data


def _describe(
    native: NativeLibrary, device: str, plan: LoadPlan, weights: PackedWeights, cache: PagedCache
) -> BackendInfo:
    config, spec, engine = plan.config, plan.spec, plan.engine
    block_size = cache.pages_per_block * LANES
    is_raised = block_size != engine.block_size
    note = f"engine.block_size {engine.block_size} is raised to {block_size}: pages hold {LANES} tokens"
    # Backends with equal fingerprints give equal bits on any machine and instruction set. So it is of all that results
    # depend on; dynamic rope scaling depends on the context length.
    content = f"{weights.content_hash} {plan.precision_name} {native.functions.brlite_kernel_version()}"
    fingerprint = hashlib.blake2b(content.encode(), digest_size=8)
    fingerprint.update(msgspec.json.encode(config))
    fingerprint.update(inverse_frequencies(config.rope, spec.build_seq).tobytes())
    return BackendInfo(
        name="native",
        device=device,
        dtype="bfloat16",
        precision=plan.precision_name,
        vocab_size=config.vocab_size,
        max_model_len=spec.build_seq,
        max_num_seqs=spec.build_batch,
        block_size=block_size,
        num_blocks=cache.num_blocks,
        kv_dtype="int8" if cache.format == abi.INT8 else "bfloat16",
        weight_bytes=weights.layout.num_bytes,
        kv_bytes=cache.memory.num_bytes,
        sliding_window=config.common_window,
        max_draft_tokens=MAX_DRAFT_TOKENS,
        hidden_size=config.hidden_size,
        pooling=spec.pooling,
        matryoshka_dimensions=spec.matryoshka_dimensions,
        can_generate=plan.model.has_head,
        is_batch_invariant=True,
        runs_logits_processors=True,
        fingerprint=fingerprint.hexdigest(),
        notes=(note,) if is_raised else (),
    )

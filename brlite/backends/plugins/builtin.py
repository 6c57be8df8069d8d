"""brlite's own backends behind the contract of engine plugins: `--engine brlite`.

Serving does not need it: without it the backends have more features. It shows that the contract can be implemented, and
is a real engine for `engine-check`. Each slot is a fixed range of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from brlite.backends.plugins.contract import Capabilities, PluginRow
from brlite.backends.plugins.slots import Slots
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import BackendInfo, ScheduledSeq
from brlite.errors import ConfigError, EngineError

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}  # of a backend that is not batch-invariant, by its dtype


@runtime_checkable
class LogitsBackend(Protocol):
    """A backend that can also return its logits."""

    @property
    def info(self) -> BackendInfo: ...

    def last_logits(self, seqs: Sequence[ScheduledSeq]) -> npt.NDArray[np.float32]:
        """Compute a step and return the logits [R, V] after the last token of each sequence."""
        ...

    def close(self) -> None: ...


class BuiltinEngine:
    """An `Engine`. `[engine] backend` chooses the one that computes."""

    def __init__(self) -> None:
        self._backend: LogitsBackend | None = None

    def open(self, spec: ModelSpec, config: EngineConfig) -> Capabilities:
        from brlite.backends.choose import load_backend
        from brlite.checkpoint import open_checkpoint
        from brlite.checkpoint.checked_model import check_model
        from brlite.checkpoint.fetch import locate_model

        spec = msgspec.structs.replace(spec, num_blocks=0)  # 0: enough for a whole context in each slot
        checkpoint = open_checkpoint(locate_model(spec.name, spec.path), spec.model_file)
        backend = load_backend(checkpoint, check_model(checkpoint, spec), spec, config)
        if not isinstance(backend, LogitsBackend):
            backend.close()
            raise ConfigError(f"backend {backend.info.name} does not give its logits; native and torch do")
        self._backend = backend
        self._max_step_tokens = max(config.step_tokens(), spec.build_batch)
        self._blocks_per_slot = math.ceil(spec.build_seq / backend.info.block_size)
        info = backend.info
        capabilities = Capabilities(
            name=f"brlite-{info.name}",
            max_seqs=info.max_num_seqs,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            can_mix_rows=True,
            can_prefill_together=True,
            can_chunk_prompts=True,
            is_deterministic=info.is_batch_invariant,
            is_batch_invariant=info.is_batch_invariant,
            tolerance=0.0 if info.is_batch_invariant else TOLERANCES.get(info.dtype, 0.05),
            device=info.device,
            dtype=info.dtype,
            weight_bytes=info.weight_bytes,
            kv_bytes=info.kv_bytes,
            fingerprint=info.fingerprint,
            notes=info.notes,
        )
        self._slots = Slots(capabilities)
        return capabilities

    def step(self, rows: Sequence[PluginRow]) -> npt.NDArray[np.float32]:
        if self._backend is None:
            raise EngineError("the engine is closed")
        self._slots.check(rows)
        firsts = [row.slot * self._blocks_per_slot for row in rows]
        seqs = [
            ScheduledSeq(row.slot, row.start, row.token_ids.tolist(), [*range(first, first + self._blocks_per_slot)])
            for row, first in zip(rows, firsts, strict=True)
        ]
        if sum(len(row.token_ids) for row in rows) <= self._max_step_tokens:
            logits = self._backend.last_logits(seqs)
        else:
            logits = np.concatenate([self._in_pieces(self._backend, seq) for seq in seqs])
        self._slots.extend(rows)
        return logits

    def release(self, slot: int) -> None:
        self._slots.release(slot)

    def close(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _in_pieces(self, backend: LogitsBackend, seq: ScheduledSeq) -> npt.NDArray[np.float32]:
        """The logits after a row that is too long for one step, computed in several."""
        size, num_tokens = self._max_step_tokens, len(seq.token_ids)
        for start in range(0, num_tokens, size):
            piece = seq.token_ids[start : start + size]
            logits = backend.last_logits([msgspec.structs.replace(seq, start=seq.start + start, token_ids=piece)])
        return logits

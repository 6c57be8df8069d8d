"""What an engine must do to be served by brlite: open, step, release, close. All there is between us and a closed one.

An engine holds slots, one for each sequence of its built batch. A step extends some slots by tokens and gives the
logits that follow them. Knows no requests, no sampling, no text and no torch.

An engine is a class that is made without arguments, and is found by an entry point:

    [options.entry_points]
    brlite.engines =
        my_engine = my_package.my_module:MyEngine

`brlite serve --engine my_engine` serves with it, `brlite engine-check --engine my_engine` tries what is promised below.
`toy.py` is a worked example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import ConfigError, EngineError
from brlite.models.precision import PrecisionName
from brlite.tokenizer import Tokenizer

TokenIds = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32] | npt.NDArray[np.float16]

STATIC_CONTEXT = 2048  # tokens


class RowRefused(EngineError):
    """A row that cannot be computed: no such slot, no such position, no such token. Nothing of its step was."""


class PluginRow(NamedTuple):
    """What a step computes of one slot: `token_ids` [T] int32 at positions `start` to `start + T - 1`.

    Keys and values of all earlier positions are in the slot: `start` is its length. A row without tokens stands for a
    slot that has nothing to do; such rows come only to engines that want one for every slot.
    """

    slot: int
    start: int
    token_ids: TokenIds

    @property
    def end(self) -> int:
        """The length of its slot after the step."""
        return self.start + len(self.token_ids)

    @property
    def is_prompt(self) -> bool:
        """Whether it begins a sequence or has several tokens. Any other row with a token is a decode."""
        return len(self.token_ids) > 1 or (self.start == 0 and len(self.token_ids) == 1)


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can do, known once it is open. brlite never uses more, and `engine-check` tests what is here.

    `max_seqs` is the built batch: slots are numbered 0 to `max_seqs - 1`. A slot holds up to `max_model_len` tokens.
    `vocab_size` is the width of the logits, padding of the vocabulary included.

    * `can_mix_rows`: prompts and decodes in one step. Without, they come in steps of their own.
    * `can_prefill_together`: several prompts in one step. Without, prompts come one at a time.
    * `can_chunk_prompts`: a row of several tokens may start behind position 0. Without, a prompt comes whole, and
      no request can have `prompt_logprobs`.
    * `max_row_tokens`: the longest row; None is `max_model_len`. Anything less needs `can_chunk_prompts`.
    * `needs_every_slot`: a step has exactly `max_seqs` rows, that of slot i in place i, some without tokens.
      Without, it has a row for each slot that has something to do, in any order.
    * `hidden_size`: it `GivesHiddenStates` of so many numbers, for embeddings. 0: not. Needs `can_chunk_prompts`.
    * `is_deterministic`: the same slots, filled by the same steps, give the same bits.
    * `is_batch_invariant`: a row's bits depend on the tokens of its own slot alone: not on its company, its slot's
      number, nor on the rows that the tokens came in. What is not claimed here holds within `tolerance`, the largest
      difference of two logits as a share of the largest magnitude in their rows; 0.1 at most.

    The rest is shown: `device` and `dtype` to people and in metrics, sizes in bytes where they are known, `notes` as
    warnings at the start, `fingerprint` as part of answers: equal ones promise equal bits.
    """

    name: str
    max_seqs: int
    max_model_len: int
    vocab_size: int
    version: str = ""
    can_mix_rows: bool = False
    can_prefill_together: bool = False
    can_chunk_prompts: bool = False
    max_row_tokens: int | None = None
    needs_every_slot: bool = False
    hidden_size: int = 0
    is_deterministic: bool = False
    is_batch_invariant: bool = False
    tolerance: float = 0.02
    logits_dtype: Literal["float32", "float16"] = "float32"
    device: str = "unknown"
    dtype: str = "unknown"
    weight_bytes: int = 0
    kv_bytes: int = 0
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    @property
    def longest_row(self) -> int:
        return min(self.max_row_tokens or self.max_model_len, self.max_model_len)


class PluginEngine(Protocol):
    """Computes logits. All calls come from one thread, the same for an engine's whole life, and one at a time.

    That thread is not the event loop's, so any of them may block.
    """

    def open(self, spec: ModelSpec, config: EngineConfig) -> Capabilities:
        """Build or load what `spec` describes, which may take minutes, and say what it can do.

        `spec` has the manual's fields: `path` or `name` (cached_dir, model), `model_file`, `input_name`, `output_name`,
        `serialize_file`, `precision` (model_precision), `build_seq`, `build_batch`, `tensor_parallel`
        (distribute_param), `devices`, `vocab_size`; `config` has `threads`, and `options`, which are the engine's own.
        Files may be written here only, and none but `serialize_file`. Raises `ConfigError` for a field that it cannot
        serve, `ModelError` for files that are missing or broken, naming them.
        """
        ...

    def step(self, rows: Sequence[PluginRow]) -> Logits:
        """Extend each row's slot by its tokens. Returns logits [len(rows), vocab_size]: of each row's last token.

        They are in the order of `rows`, raw (no temperature, no mask), and the caller's to write to. Those of a row
        without tokens mean nothing. A row that went wrong by itself has NaN in its logits.

        Raises `RowRefused`, before anything is computed, for a step that its capabilities or its slots do not allow: a
        position beyond `max_model_len` above all. After any other exception the rows of the step are lost: their slots
        are released next. Either way slots that were not in the step are as they were. An engine that can never step
        again raises `BackendLost`: it is closed, and a new one opened or the server ended (`engine.on_rank_failure`).
        """
        ...

    def release(self, slot: int) -> None:
        """Forget what is in a slot: its length is 0 again, and nothing of it shows in what comes there next.

        Other slots stay as they are. A slot that is empty, or was never used, may be released.
        """
        ...

    def close(self) -> None:
        """Give everything back. May be called twice, and without `open` or after one that failed."""
        ...


@runtime_checkable
class BringsTokenizer(Protocol):
    """An engine that has its own tokenizer, and so needs no model folder."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. May be called before `open`, and on another thread."""
        ...


@runtime_checkable
class GivesHiddenStates(Protocol):
    """An engine that has what its logits are made of, for embeddings. `Capabilities.hidden_size` says so."""

    def hidden_states(self, slots: Sequence[int]) -> npt.NDArray[np.float32]:
        """The hidden states [len(slots), hidden_size], after the final norm, of each slot's last token.

        They are asked for right after the step that had the tokens.
        """
        ...


def with_static_context(spec: ModelSpec) -> ModelSpec:
    """The spec with a context and a precision: an engine has its shapes before it knows the model.

    Left out, they are `STATIC_CONTEXT` and bf16. Raises `ConfigError` for a precision that engines do not know.
    """
    precision = "bf16" if spec.precision == "auto" else spec.precision
    if precision not in get_args(PrecisionName):
        allowed = ", ".join(get_args(PrecisionName))
        raise ConfigError(f"precision {precision} is of native kernels only; an engine plugin may have {allowed}")
    return msgspec.structs.replace(spec, build_seq=spec.build_seq or STATIC_CONTEXT, precision=precision)

"""The contract of engine plugins: open, step, release, close. It is the whole interface to a closed engine.

An engine holds slots, one for each sequence of its built batch. A step extends some slots by tokens and gives the
logits that follow them. The contract has no requests, no sampling, no text and no torch.
An engine is a class whose constructor takes no arguments. It is found by an entry point:

    [options.entry_points]
    brlite.engines =
        my_engine = my_package.my_module:MyEngine

`brlite serve --engine my_engine` serves with it, `brlite engine-check --engine my_engine` tests the promises below.
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
    """A row that cannot be computed: no such slot, position or token. Nothing of its step was computed."""


class PluginRow(NamedTuple):
    """The tokens that a step computes for one slot: `token_ids` [T] int32 at positions `start` to `start + T - 1`.

    Keys and values of all earlier positions are in the slot: `start` is its length. A row without tokens stands for an
    idle slot; only engines with `needs_every_slot` get such rows.
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
    """An engine's abilities, which `open` returns. brlite never uses more, and `engine-check` tests them.

    `max_seqs` is the built batch: slots are numbered 0 to `max_seqs - 1`. A slot holds up to `max_model_len` tokens.
    `vocab_size` is the width of the logits, padding of the vocabulary included.

    * `can_mix_rows`: prompts and decodes in one step. Without, they come in steps of their own.
    * `can_prefill_together`: several prompts in one step. Without, prompts come one at a time.
    * `can_chunk_prompts`: a row of several tokens may start behind position 0. Without, a prompt comes whole, and
      no request can have `prompt_logprobs`.
    * `max_row_tokens`: the longest row; None is `max_model_len`. Anything less needs `can_chunk_prompts`.
    * `needs_every_slot`: a step has exactly `max_seqs` rows, that of slot i in place i, some without tokens.
      Without, it has a row for each slot with work, in any order.
    * `hidden_size`: the length of the hidden states of an engine that `GivesHiddenStates`, for embeddings. 0: it does
      not. Needs `can_chunk_prompts`.
    * `is_deterministic`: the same slots, filled by the same steps, give the same bits.
    * `is_batch_invariant`: a row's bits depend on the tokens of its own slot alone: not on other rows, its slot's
      number, or how the tokens were split into rows. Without these two claims, equality holds within `tolerance`, the
      largest difference of two logits as a share of the largest magnitude in their rows; 0.1 at most.
    Other fields are for display: `device` and `dtype` also in metrics, sizes in bytes if known, `notes` as warnings at
    the start, `fingerprint` as part of answers: equal fingerprints promise equal bits.
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
        """Build or load the model of `spec`, which may take minutes. Returns the capabilities.

        `spec` has the manual's fields: `path` or `name` (cached_dir, model), `model_file`, `input_name`, `output_name`,
        `serialize_file`, `precision` (model_precision), `build_seq`, `build_batch`, `tensor_parallel`
        (distribute_param), `devices`, `vocab_size`; `config` has `threads`, and `options` that the engine defines.
        Only `open` may write files, and only `serialize_file`. Raises `ConfigError` for a field that it cannot serve,
        `ModelError` with the names of missing or broken files.
        """
        ...

    def step(self, rows: Sequence[PluginRow]) -> Logits:
        """Extend each row's slot by its tokens. Returns logits [len(rows), vocab_size]: of each row's last token.

        They are in the order of `rows`, raw (no temperature, no mask), and the caller may overwrite them. Those of a
        row without tokens are not read. If only one row failed, its logits have NaN.
        Raises `RowRefused`, before anything is computed, for a step that its capabilities or its slots do not allow,
        for example a position beyond `max_model_len`. After any other exception the rows of the step are lost, and the
        caller releases their slots. In both cases the other slots are unchanged. An engine that can never step again
        raises `BackendLost`. brlite then closes it, and opens a new one or ends the server (`engine.on_rank_failure`).
        """
        ...

    def release(self, slot: int) -> None:
        """Empty a slot: its length is 0 again, and its contents do not affect its next sequence.

        Other slots are unchanged. A slot that is empty, or was never used, may be released.
        """
        ...

    def close(self) -> None:
        """Release everything. May be called twice, without `open`, and after an `open` that failed."""
        ...


@runtime_checkable
class BringsTokenizer(Protocol):
    """An engine with its own tokenizer, which needs no model folder."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. May be called before `open`, and on another thread."""
        ...


@runtime_checkable
class GivesHiddenStates(Protocol):
    """An engine that can return hidden states, for embeddings. Its `Capabilities.hidden_size` is not 0."""

    def hidden_states(self, slots: Sequence[int]) -> npt.NDArray[np.float32]:
        """The hidden states [len(slots), hidden_size], after the final norm, of each slot's last token.

        Called directly after the step that computed these tokens.
        """
        ...


def with_static_context(spec: ModelSpec) -> ModelSpec:
    """The spec with a context and a precision, which an engine needs before it reads the model.

    The defaults are `STATIC_CONTEXT` and bf16. Raises `ConfigError` for a precision that engines do not have.
    """
    precision = "bf16" if spec.precision == "auto" else spec.precision
    if precision not in get_args(PrecisionName):
        allowed = ", ".join(get_args(PrecisionName))
        raise ConfigError(f"precision {precision} is of native kernels only; an engine plugin may have {allowed}")
    return msgspec.structs.replace(spec, build_seq=spec.build_seq or STATIC_CONTEXT, precision=precision)

"""The interface between scheduling and computing: a `Batch` goes down, a `StepResult` comes up.

Both are plain data, without tensors and logits. Structs of one sequence are never in a reference cycle: `gc=False`.
A `Batch` can be given to an in-process model, sent as msgpack to tensor-parallel ranks (its masks and processors are
not sent: rank 0 draws), or written into a test.
"""

from __future__ import annotations

import enum
import math
import threading
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from brlite.config.options import STEP_TOKENS
from brlite.engine.outputs import TokenLogprob
from brlite.errors import BackendLost, EngineError
from brlite.sampling_params import PoolingParams, SamplingParams

MAX_DRAFT_TOKENS = 16  # of a sequence in a step: the limit of brlite's backends
MASK_WAIT_SECONDS = 60.0  # for masks that a step waits for; a usual one takes a fraction of a millisecond
_WORD_BYTES = 4


class SamplingInput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The sampler's input to draw the next token of one sequence; it does not depend on the other sequences.

    The random number of a draw depends on `seed` and `position` alone. `counted_token_ids` (int32) are the distinct
    tokens of prompt and output, `output_counts` (int32) how often each was generated; both are empty without penalties.
    `banned_token_ids` may not be drawn: tokens that would end a sequence shorter than `min_tokens`, or complete one of
    `bad_words`. `cost_token_ids` (int32) are tokens whose logits are lowered after the penalties, by `costs` (float32,
    at least 0). Where the run `takes_last_draw`, that token is not counted yet: the backend does it.
    """

    params: SamplingParams
    seed: int
    position: int
    counted_token_ids: bytes = b""
    output_counts: bytes = b""
    banned_token_ids: tuple[int, ...] = ()
    cost_token_ids: bytes = b""
    costs: bytes = b""

    def counting(self, token_id: int) -> SamplingInput:
        """The same with one more generated token among those that are counted, if any are."""
        if not self.counted_token_ids:
            return self
        token_ids, counts = array("i", self.counted_token_ids), array("i", self.output_counts)
        if token_id in token_ids:
            counts[token_ids.index(token_id)] += 1
        else:
            token_ids.append(token_id)
            counts.append(1)
        return msgspec.structs.replace(self, counted_token_ids=token_ids.tobytes(), output_counts=counts.tobytes())


class PoolingInput(msgspec.Struct, frozen=True, array_like=True):
    """Which hidden states of a run are wanted: those of its last `num_tokens`, added one by one to `total`.

    A hidden state [H] is what the head reads: the last layer's, after the final norm, in float32. `total` (float64 [H])
    is the sum over earlier runs of the same prompt; empty: zeros. With `params` this run is the last, and the embedding
    is wanted: the sum, divided by the `num_pooled` hidden states that are in it, cut and scaled.
    """

    num_tokens: int
    total: bytes = b""
    params: PoolingParams | None = None
    num_pooled: int = 1


class ScheduledSeq(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A run of one sequence's tokens to compute: positions `start` to `start + len(token_ids) - 1`.

    Keys and values go to `block_table[position // block_size]`, where those of all earlier positions already are.
    With `sampling` the token after the last one is drawn. `prompt_targets`, if asked for, holds the token that follows
    each of `token_ids` in the prompt: their logprobs are wanted, with `num_prompt_logprobs` alternatives. `pooling`
    asks for hidden states, and comes without either of those, and only to a backend with a `hidden_size`.

    The last `num_draft_tokens` of `token_ids` are a draft of what will be drawn. All are computed, and a token is drawn
    after the last real one and after each draft token that was right, the i-th at position `sampling.position + i`; the
    first that differs from the draft is the last one drawn. Drafts come only with `sampling`, never with penalties,
    banned tokens or prompt targets, and only as many as `BackendInfo.max_draft_tokens`.

    With `takes_last_draw` the run is the one token that the step before draws for this sequence, which is not known
    yet; `token_ids` is [0] in its place. That comes only to `CanRunAhead.launch`, and never behind a step with drafts.
    """

    seq_id: int
    start: int
    token_ids: list[int]
    block_table: list[int]
    sampling: SamplingInput | None = None
    prompt_targets: list[int] = []
    num_prompt_logprobs: int = 0
    num_draft_tokens: int = 0
    pooling: PoolingInput | None = None
    takes_last_draw: bool = False

    @property
    def num_draws(self) -> int:
        """How many tokens are drawn: after its last real token, and after each draft token."""
        return 0 if self.sampling is None else 1 + self.num_draft_tokens

    def with_last_draw(self, token_id: int) -> ScheduledSeq:
        """The run as it is once the token that it takes is known."""
        sampling = None if self.sampling is None else self.sampling.counting(token_id)
        return msgspec.structs.replace(self, token_ids=[token_id], sampling=sampling, takes_last_draw=False)


class TokenMask(NamedTuple):
    """Which tokens one draw may give: bit t % 32 of `words[t // 32]` (int32) is 1 where token t may be drawn.

    The words are complete once `is_filled[0]` is 1.
    """

    words: memoryview
    is_filled: memoryview

    def allows(self, token_id: int) -> bool:
        return bool(self.words[token_id // 32] >> token_id % 32 & 1)


class TokenMasks:
    """The masks of a step's draws. Other threads fill them while the step computes; it waits for them before it draws.

    `words` holds rows of ceil(V / 32) int32, at first all 0. A row that is published with all 0 allows no token, and
    its sequence ends with an error. A sequence has one row for each of its draws: after its last real token, and after
    each draft token. Its rows begin at `first_rows[seq_id]`. A sequence without an entry may draw any token.
    """

    def __init__(self, vocab_size: int, num_draws: Mapping[int, int]) -> None:
        """`num_draws` is keyed by `seq_id` and has only the sequences with masks."""
        self.row_bytes = -(-vocab_size // 32) * _WORD_BYTES
        self.first_rows: dict[int, int] = {}
        num_rows = 0
        for seq_id, num in num_draws.items():
            self.first_rows[seq_id] = num_rows
            num_rows += num
        self.words = bytearray(num_rows * self.row_bytes)
        self.is_filled = bytearray(num_rows)
        self._are_all_filled = threading.Event()

    def publish(self, row: int) -> None:
        """Declare a row complete. Call it for each row, even if its sequence fails. Any thread may call it."""
        self.is_filled[row] = 1
        if 0 not in self.is_filled:
            self._are_all_filled.set()

    def wait(self, timeout: float = MASK_WAIT_SECONDS) -> None:
        """Return when all rows are published. Raises `EngineError` if one is not within `timeout` seconds."""
        if not self._are_all_filled.wait(timeout):
            raise EngineError(f"the token masks of a step were not there after {timeout:g} s")

    def of(self, seq_id: int, draw: int = 0) -> TokenMask | None:
        """The mask of a sequence's draw, which may not be complete yet."""
        first = self.first_rows.get(seq_id)
        if first is None:
            return None
        row = first + draw
        words = memoryview(self.words)[row * self.row_bytes : (row + 1) * self.row_bytes].cast("i")
        return TokenMask(words, memoryview(self.is_filled)[row : row + 1])


class LogitsProcessor(NamedTuple):
    """Python code of others that edits logits, numpy float32 [V]. `function` returns the new ones.

    It is called as `(output_token_ids, logits)`, or as `(prompt_token_ids, output_token_ids, logits)` if `num_inputs`
    is 3. It may overwrite the logits.
    """

    name: str
    function: Callable[..., Any]
    num_inputs: int


class LogitsProcessors:
    """The logits processors of one sequence, in their order, and the tokens for its next draw.

    The backend runs them once before each draw, on the model's own logits. Then `seconds` has the name of each that was
    called, and the time that it took; `error` says which one failed, so that no token can be drawn.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], prompt_token_ids: Iterable[int]) -> None:
        self.processors = processors
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.seconds: list[tuple[str, float]] = []
        self.error: str | None = None

    def begin(self, output_token_ids: list[int]) -> None:
        """Prepare the next draw, after these tokens of the answer. The list is the processors' own."""
        self.output_token_ids, self.seconds = output_token_ids, []


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """One step's work: prompt chunks and single tokens mixed, each sequence at most once.

    `masks` say which tokens some of the sequences may draw, `processors` edit the logits of some, by `seq_id`; such a
    sequence has no drafts and does not run ahead.
    """

    seqs: list[ScheduledSeq]
    masks: TokenMasks | None = None
    processors: Mapping[int, LogitsProcessors] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(seq.token_ids) for seq in self.seqs)

    def mask_of(self, seq_id: int, draw: int = 0) -> TokenMask | None:
        """The mask of a sequence's draw, None where it may draw any token."""
        return None if self.masks is None else self.masks.of(seq_id, draw)


class SampledToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A drawn token; `logprob` is there if `SamplingParams.logprobs` asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


class Undrawn(enum.Enum):
    """Why no token could be drawn for a row. The value is the text of the request's error."""

    NOT_FINITE = "the model produced logits that are not finite"
    PROCESSOR_FAILED = "a logits processor failed"
    NOTHING_ALLOWED = "no token may be drawn: what restricts the next token excludes all of them"


class SeqResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A step's result for one sequence: the tokens drawn (none for a prompt chunk with more to come).

    They are the draft tokens that were right and one more token, the same as steps of one token each would draw.
    `hidden_total` (float64 [H]) or `embedding` (float32) answers the run's `PoolingInput`.
    `error` says why this sequence cannot go on, for example logits that are not finite; others are untouched.
    """

    seq_id: int
    tokens: list[SampledToken] = []
    prompt_logprobs: list[TokenLogprob] = []
    error: str | None = None
    hidden_total: bytes = b""
    embedding: bytes = b""

    @classmethod
    def of_draws(
        cls, seq: ScheduledSeq, drawn: Iterable[SampledToken | Undrawn], prompt_logprobs: list[TokenLogprob]
    ) -> SeqResult:
        """The result of a run's `num_draws` draws, in order. Those after the first wrong draft token are dropped."""
        tokens: list[SampledToken] = []
        draft = [*seq.token_ids[-seq.num_draft_tokens :], None] if seq.num_draft_tokens else (None,)
        for token, expected in zip(drawn, draft, strict=False):
            if isinstance(token, Undrawn):
                return cls(seq.seq_id, prompt_logprobs=prompt_logprobs, error=token.value)
            tokens.append(token)
            if token.token_id != expected:
                break
        if prompt_logprobs and not all(math.isfinite(entry.logprob) for entry in prompt_logprobs):
            return cls.undrawn(seq.seq_id, Undrawn.NOT_FINITE)
        return cls(seq.seq_id, tokens, prompt_logprobs)

    @classmethod
    def undrawn(cls, seq_id: int, reason: Undrawn) -> SeqResult:
        """The result of a sequence that no token could be drawn for."""
        return cls(seq_id, error=reason.value)


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """One `SeqResult` for each `ScheduledSeq`, in the batch's order. `num_threads` computed; 0: not known.

    `num_host_draws` are the tokens that the host drew while a device that runs ahead waited.
    """

    seqs: list[SeqResult]
    num_threads: int = 0
    num_host_draws: int = 0


class RowCosts(NamedTuple):
    """The cost of one more row, in steps of one row.

    Up to `num_cheap` rows a step is limited by memory bandwidth, and a row costs `cheap`. Beyond that it is limited by
    computing, and a row costs `other`.
    """

    num_cheap: int
    cheap: float
    other: float

    def cost(self, num_rows: int) -> float:
        """The cost of a step."""
        num_cheap = min(num_rows, self.num_cheap)
        return 1 + self.cheap * (num_cheap - 1) + self.other * (num_rows - num_cheap)


CPU_ROWS = RowCosts(4, 0.09, 0.2)  # measured with native int8 steps on two cores
CARD_ROWS = RowCosts(64, 0.009, 0.03)  # measured on one H200 in bf16: 1, 64 and 128 rows of the 8B shape


class BackendInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A backend's properties and capacity. Sizes are bytes; `notes` are fallbacks an operator should know of.

    `fingerprint` identifies weights, precision and kernels: equal fingerprints give equal bits. A batch-invariant
    backend gives a row the same bits in any batch. A step can have up to `max_draft_tokens` draft tokens of a sequence.
    A backend that is not batch-invariant gets only those that a grammar forces: the mask allows no other token there,
    so rounding cannot change an answer. Without `has_prompt_logprobs` it never gets prompt targets, with a
    `hidden_size` of 0 no pooling. `pooling` is the model's own way to make embeddings (auto: of the last token; none:
    it has none). `matryoshka_dimensions` are the lengths that they may be cut to (with 0 among them: any). A model that
    cannot generate never draws. Without `runs_logits_processors` it gets no `Batch.processors`.
    A backend that `can_run_ahead` is a `CanRunAhead` and gets its steps by `launch`. `step_tokens` is the default limit
    of tokens in a step: so many that one read of the matrices serves many tokens. `row_costs` are for the decision
    whether drafts pay.
    """

    name: str
    device: str
    dtype: str
    precision: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    kv_dtype: str
    weight_bytes: int
    kv_bytes: int
    sliding_window: int | None = None
    notes: tuple[str, ...] = ()
    max_draft_tokens: int = 0
    fingerprint: str = ""
    is_batch_invariant: bool = False
    has_prompt_logprobs: bool = True
    hidden_size: int = 0
    pooling: Literal["auto", "last", "mean", "none"] = "auto"
    matryoshka_dimensions: tuple[int, ...] = ()
    can_generate: bool = True
    can_run_ahead: bool = False
    step_tokens: int = STEP_TOKENS
    runs_logits_processors: bool = False
    row_costs: RowCosts = CPU_ROWS

    @property
    def verifies_drafts(self) -> bool:
        """Whether it can verify drafts of n-grams and draft models."""
        return self.is_batch_invariant and self.max_draft_tokens > 0


class Backend(Protocol):
    """Computes steps. All calls come from one thread, one at a time; a row never depends on its neighbours."""

    @property
    def info(self) -> BackendInfo: ...

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step. An exception fails the sequences of this batch and no others."""
        ...

    def close(self) -> None:
        """Give back memory, threads and processes. Nothing is called afterwards."""
        ...


@runtime_checkable
class CanRunAhead(Protocol):
    """A `Backend` that can be given a step before the result of the previous step is read.

    So a device does not idle between two steps. Steps run in the order of their launches, and each sees the cache as
    the previous step left it. At a launch, at most one other step has a result that was not fetched. All calls come
    from one thread, also those of `execute`, which does the same as `launch(batch)()`.
    """

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        """Queue a step without waiting for the previous one, and return a function that waits for the result.

        A step that the device cannot do alone (for example, with a draw on the host) may be computed here, which is
        slower and correct. Each result is fetched once, in order; those of steps under way at `close` are not. If a row
        `takes_last_draw` and the previous step failed or drew no token for it, use any valid token: the result is
        dropped. An exception, here or from the returned function, fails the sequences of this batch and no others.
        """
        ...


@runtime_checkable
class CanBeLost(Protocol):
    """A `Backend` of several processes, of which one may end unexpectedly, in a step or between two.

    From then on `execute` always raises `BackendLost`. The watcher is called once.
    """

    def watch(self, on_lost: Callable[[BackendLost], None]) -> None:
        """Call `on_lost` once when a process is lost, on any thread. `watch` is called before the first step."""
        ...


class CanClose(Protocol):
    def close(self) -> None: ...


def close_all(owned: Iterable[CanClose]) -> None:
    """Close each, also after one that raises. The last error is raised at the end."""
    with ExitStack() as closing:
        for each in reversed(list(owned)):
            closing.callback(each.close)


def close_dropped(what: str, backends: list[Backend]) -> None:
    """The finalizer of an object that owns backends and was dropped without `close`."""
    warnings.warn(f"an {what} was dropped without close(); its model is freed now", ResourceWarning, stacklevel=2)
    close_all(backends)

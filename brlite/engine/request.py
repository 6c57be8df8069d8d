"""A request and its sequences: their tokens, how many of those are computed, and their state.

Queues, blocks and batches are elsewhere; their owners update the numbers here.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from brlite.engine.backend import LogitsProcessor, LogitsProcessors
from brlite.engine.beam_search import BeamSearch
from brlite.engine.detokenizer import Detokenizer
from brlite.engine.ngrams import NgramDrafter
from brlite.engine.outputs import CompletionOutput, RequestOutput, RequestTimes, TokenLogprob
from brlite.engine.repetitions import Repetitions
from brlite.errors import BrliteError
from brlite.grammar.matcher import Grammar, Matcher
from brlite.sampling_params import FinishReason, Pooling, PoolingParams, SamplingParams
from brlite.tokenizer import Tokenizer

# Receives a request's deltas on the event-loop thread. The last one is finished, or it is the error that ended it.
Sink = Callable[[RequestOutput | BrliteError], None]
# Is offered the text and the number of tokens of each delta but a completion's last. False, as for the first one: the
# sink must get the delta.
TextSink = Callable[[str, int], bool]

_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


class Origin(msgspec.Struct, frozen=True):
    """Where requests come from, which sets their order and the cached prefixes that they share; see `Request`."""

    tenant: str = ""
    weight: int = 1
    priority: int = 0
    cache_salt: str = ""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request to the engine. Requests share cached prefixes only if their `cache_salt` is the same.

    * Order: each `tenant` has turns, a share of the queue and, unless the config shares it, a prefix cache of its own.
      With `weight` 2 it has two turns for each one of others. Requests with a lower `priority` come first. Requests
      of one `group` share a turn; a request without a group is a group of its own.
    * A request that is exempt from the queue timeout waits without a limit. It belongs to a body whose first request
      is not exempt.
    * `grammar` is the compiled `params.structured`; `bad_words` are the tokens of `params.bad_words`; `processors` are
      made from `params.logits_processors`, those of each answer.
    * With `is_strict` the request is refused instead of having a limit cut.
    * `shown_token_ids` are special tokens that stay in the text, although others are left out.
    * With `pooling` the result is the prompt's embedding, and no completion.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    cache_salt: str = ""
    tenant: str = ""
    weight: int = 1
    priority: int = 0
    group: str = ""
    is_exempt_from_queue_timeout: bool = False
    grammar: Grammar | None = None
    bad_words: tuple[tuple[int, ...], ...] | None = None
    processors: tuple[tuple[LogitsProcessor, ...], ...] | None = None
    is_strict: bool = False
    shown_token_ids: frozenset[int] = frozenset()
    pooling: PoolingParams | None = None


class TokenCounts:
    """The distinct ones of the last `num_last` tokens of prompt and output, with how often each was generated.

    A new token takes constant time. A negative `num_last` is a window without end.
    """

    def __init__(self, prompt_token_ids: list[int], num_last: int) -> None:
        self.is_windowed = num_last >= 0
        token_ids = prompt_token_ids[-num_last:] if self.is_windowed else prompt_token_ids
        self._ids = array("i", dict.fromkeys(token_ids))
        self._counts = array("i", bytes(self._ids.itemsize * len(self._ids)))
        self._index = {token_id: index for index, token_id in enumerate(self._ids)}
        self._num_last = num_last
        self._window = deque[tuple[int, int]]()  # the last tokens, each with 1 if it was generated, 0 if not
        self._num_in_window = Counter[int]()
        if self.is_windowed:
            self._window.extend((token_id, 0) for token_id in token_ids)
            self._num_in_window.update(token_ids)

    def add(self, token_id: int) -> None:
        index = self._index.setdefault(token_id, len(self._ids))
        if index == len(self._ids):
            self._ids.append(token_id)
            self._counts.append(0)
        self._counts[index] += 1
        if self.is_windowed:
            self._window.append((token_id, 1))
            self._num_in_window[token_id] += 1
            if len(self._window) > self._num_last:
                self._drop(*self._window.popleft())

    def _drop(self, token_id: int, is_output: int) -> None:
        self._num_in_window[token_id] -= 1
        self._counts[self._index[token_id]] -= is_output
        if not self._num_in_window[token_id]:
            del self._num_in_window[token_id]
            index, last_id, last_count = self._index.pop(token_id), self._ids.pop(), self._counts.pop()
            if last_id != token_id:  # the last entry takes its place
                self._ids[index], self._counts[index], self._index[last_id] = last_id, last_count, index

    @property
    def token_ids(self) -> bytes:
        return self._ids.tobytes()

    @property
    def output_counts(self) -> bytes:
        return self._counts.tobytes()


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's `n` completions while it is computed. `token_ids` is the prompt followed by the output.

    `draft_token_ids` are the draft that the step under way verifies; they are not tokens of the sequence yet.
    `num_in_flight_tokens` are in steps under way; they are computed when those have ended. With `is_plain` all that its
    steps give are draws, and these need no more than its parameters, seed and position.
    """

    seq_id: int
    index: int
    state: RequestState
    token_ids: list[int]
    num_prompt_tokens: int
    seed: int
    detokenizer: Detokenizer
    counts: TokenCounts | None
    cache_root: bytes
    is_plain: bool = False
    matcher: Matcher | None = None
    repetitions: Repetitions | None = None  # with DRY only
    processors: LogitsProcessors | None = None
    status: Literal["waiting", "running", "finished"] = "waiting"
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    num_sealed_blocks: int = 0
    is_started: bool = False
    waiting_since: float = 0.0
    drafter: NgramDrafter | None = None
    steps_saved: float = (
        0.0  # by right draft tokens, less the cost of drafts; those that a grammar forces cost nothing here
    )
    draft_token_ids: list[int] = field(default_factory=list)
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    hidden_total: bytes = b""  # the sum of the hidden states so far, for pooling by their mean

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_scheduled_tokens(self) -> int:
        """How many tokens are computed, or will be by steps under way: where the next run begins."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    @property
    def num_left(self) -> int:
        """How many tokens are left to compute. If all are computed: 1, the token that is being drawn."""
        num_in_flight = self.num_in_flight_tokens
        num_left = len(self.token_ids) - self.num_computed_tokens - num_in_flight
        return num_left or int(num_in_flight > 0 and not self.ends_with_step)

    @property
    def is_being_drawn(self) -> bool:
        """Whether the step under way draws its next token, or makes its embedding."""
        num_in_flight = self.num_in_flight_tokens
        return num_in_flight > 0 and self.num_computed_tokens + num_in_flight == len(self.token_ids)

    @property
    def ends_with_step(self) -> bool:
        """Whether no run may follow before the step under way ends: its run is the last, or its result decides."""
        state = self.state
        if state.pooling is not None or state.search is not None:
            return True
        return len(self.token_ids) - self.num_prompt_tokens + 1 >= state.max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether its prompt must be computed in full for prompt logprobs: true once, for one sequence of a request."""
        params = self.state.request.params
        return self.index == 0 and params.prompt_logprobs is not None and self.state.prompt_done_time is None

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)
        if self.repetitions is not None:
            self.repetitions.add(token_id)


@dataclass(eq=False, slots=True)
class RequestState:
    """A request in the engine. `output` is what its sink has not got yet.

    It has one sequence until its prompt is cached, and `n` from then on. `pooling` says how its embedding is made. With
    a beam `search` its sequences are the beams, and at the end the `n` best answers.
    """

    request: Request
    output: RequestOutput
    max_tokens: int
    ends: dict[int, int | None]  # the tokens that end an answer, each with its stop reason
    sink: Sink
    seed: int
    arrival_time: float
    cache_root: bytes
    priority: int  # the request's own, until it has waited too long
    sequences: list[Sequence] = field(default_factory=list)
    num_started: int = 0
    scheduled_time: float | None = None
    prompt_done_time: float | None = None
    partial_prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    pooling: Pooling | None = None
    search: BeamSearch | None = None
    text_sink: TextSink | None = None
    prompt_repetitions: Repetitions | None = None  # of the prompt, for the completions that are not made yet
    is_aborted: bool = False

    @property
    def is_started(self) -> bool:
        return self.scheduled_time is not None

    @property
    def is_queued(self) -> bool:
        """Whether one of its completions has not begun yet."""
        return self.num_started < self.request.params.n

    @property
    def is_finished(self) -> bool:
        for seq in self.sequences:
            if seq.status != "finished":
                return False
        return self.is_aborted or len(self.sequences) == self.request.params.n

    def make_repetitions(self, tokenizer: Tokenizer) -> Repetitions:
        """The repetitions of the prompt (DRY) for the next sequence. The prompt is read once for all sequences."""
        request = self.request
        repetitions = self.prompt_repetitions or Repetitions(request.params, request.prompt_token_ids, tokenizer)
        self.prompt_repetitions = repetitions.copy() if len(self.sequences) + 1 < request.params.n else None
        return repetitions

    def add_prompt_logprobs(self, logprobs: list[TokenLogprob], *, is_first: bool) -> None:
        """Collect the logprobs of one prompt chunk. A preempted prompt starts over with its first chunk."""
        if is_first:
            self.partial_prompt_logprobs = []
        self.partial_prompt_logprobs.extend(logprobs)

    def finish_prompt_logprobs(self) -> None:
        """Complete the logprobs after the last chunk. The first token gets None: no token comes before it."""
        if self.request.params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None, *self.partial_prompt_logprobs]

    def add_delta(self, delta: CompletionOutput) -> None:
        """Add to the output. A step's deltas of one completion follow each other."""
        deltas = self.output.outputs
        if deltas and deltas[-1].index == delta.index:
            deltas[-1].merge(delta)
        else:
            deltas.append(delta)

    def times(self, now: float) -> RequestTimes:
        """How long each phase took of a request that ends now; 0 for one that it did not reach."""
        scheduled, prompt_done = self.scheduled_time or now, self.prompt_done_time or now
        return RequestTimes(scheduled - self.arrival_time, prompt_done - scheduled, now - prompt_done)


def sibling_seed(seed: int, index: int) -> int:
    """The seed of the completion at `index`: the request's own for the first, spread over 64 bits for the others."""
    return (seed + index * _GOLDEN_RATIO_64) % 2**64


def add_sequence(
    tokenizer: Tokenizer, seq_ids: Iterator[int], clock: Callable[[], float], state: RequestState
) -> Sequence:
    """Add a sequence of its prompt to a request, and do not queue it."""
    request, params, prompt_token_ids = state.request, state.request.params, state.request.prompt_token_ids
    index = len(state.sequences)
    counts = TokenCounts(prompt_token_ids, params.repeat_last_n) if params.has_penalties else None
    is_restricted = params.min_tokens or request.bad_words or request.grammar or request.processors
    reports_prompt = request.pooling is not None or params.prompt_logprobs is not None
    detokenizer = Detokenizer(
        tokenizer,
        params.stop,
        ends=state.ends,
        max_tokens=state.max_tokens,
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        min_tokens=params.min_tokens,
        shown_token_ids=request.shown_token_ids,
    )
    seq = Sequence(
        seq_id=next(seq_ids),
        index=index,
        state=state,
        token_ids=list(prompt_token_ids),
        num_prompt_tokens=len(prompt_token_ids),
        seed=sibling_seed(state.seed, index) if index else state.seed,
        detokenizer=detokenizer,
        counts=counts,
        cache_root=state.cache_root,
        is_plain=not (is_restricted or reports_prompt or counts is not None or params.dry_multiplier),
        waiting_since=clock(),
        block_digests=state.sequences[0].block_digests.copy() if state.sequences else [],
        matcher=None if request.grammar is None else request.grammar.matcher(),
        repetitions=state.make_repetitions(tokenizer) if params.dry_multiplier else None,
        processors=None
        if request.processors is None
        else LogitsProcessors(request.processors[index], prompt_token_ids),
    )
    state.sequences.append(seq)
    return seq

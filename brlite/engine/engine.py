"""The synchronous engine: requests in, a `Batch` out, a `StepResult` in, deltas out to each request's sink.

Owns all state of requests and blocks, on one thread. It does not compute: the caller of `schedule` runs the batch on a
backend, on any thread, and passes the result to `update`, or the error to `fail`. Before that, `schedule_ahead` may
decide one more batch. `request_queue.py` bounds what waits, `scheduler.py` chooses the sequences of a step,
`beam_sequences.py` continues beams.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from brlite.config.options import EngineConfig, GrammarConfig, LimitsConfig
from brlite.engine.admission import admit, check_prepared
from brlite.engine.backend import (
    Backend,
    BackendInfo,
    Batch,
    LogitsProcessors,
    SampledToken,
    ScheduledSeq,
    SeqResult,
    StepResult,
    Undrawn,
)
from brlite.engine.bad_words import TokenIds, encode_bad_words
from brlite.engine.beam_sequences import BeamSequences
from brlite.engine.block_manager import DIGEST_BYTES, BlockManager
from brlite.engine.draft_model import DraftPlan
from brlite.engine.guidance import GuidedSeq, StepGuidance
from brlite.engine.logits_processors import Factory, ProcessorMaker, ProcessorTimes
from brlite.engine.outputs import CompletionOutput, RequestOutput
from brlite.engine.request import Request, RequestState, Sequence, Sink, TextSink, add_sequence
from brlite.engine.request_queue import RequestQueue
from brlite.engine.scheduler import Runs, Scheduler, scheduled_seq
from brlite.engine.scoring import ScoringHead
from brlite.engine.stats import EngineStats
from brlite.errors import BrliteError, EngineError, InvalidRequest
from brlite.grammar.compiler import GrammarCompiler
from brlite.sampling_params import FinishReason, SamplingParams
from brlite.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """A step that was scheduled and has not ended."""

    runs: Runs
    guidance: StepGuidance | None
    processors: dict[int, LogitsProcessors]
    start: float
    is_ahead: bool


class Engine:
    """Decides the next step and applies the result of the last one to its requests."""

    def __init__(
        self,
        info: BackendInfo,
        tokenizer: Tokenizer,
        config: EngineConfig,
        limits: LimitsConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        grammar: GrammarConfig | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        scoring_head: ScoringHead | None = None,
        draft_backend: Backend | None = None,
        logits_processors: Mapping[str, Factory] | None = None,
    ) -> None:
        """`sampling_defaults` are the model's own, for requests that leave these parameters out. `logits_processors`
        are the factories that requests may name.

        `draft_backend` computes a smaller model of the same vocabulary that drafts tokens ahead. The caller runs it
        before each `schedule` (see `plan_drafts`), and closes it.
        """
        self.info = info
        self.tokenizer = tokenizer
        self.config = config
        self.limits = limits
        self.sampling_defaults = sampling_defaults or {}
        self.scoring_head = scoring_head  # for callers that score hidden states; not used here
        self.stats = EngineStats(info.max_model_len, clock)
        self.compiler = GrammarCompiler(tokenizer, info.vocab_size, grammar or GrammarConfig())
        self.processor_maker = ProcessorMaker(logits_processors or {}, tokenizer)
        self._processor_times = ProcessorTimes()
        self._clock = clock
        self._seq_ids = itertools.count()
        self._add_sequence = partial(add_sequence, tokenizer, self._seq_ids, clock)
        self._private_salt = secrets.token_bytes(16)
        self._begin(draft_backend)

    def _begin(self, draft_backend: Backend | None) -> None:
        """Set the state of an engine without requests and cached blocks."""
        info = self.info
        self.guidance: StepGuidance | None = None  # of the step decided last; the caller fills its masks
        self._blocks = BlockManager(info.num_blocks, info.block_size)
        self._scheduler = Scheduler(info, self.config, self._blocks, draft_backend)
        self.draft_model, self.may_draft = self._scheduler.speculation.model, self._scheduler.speculation.may_draft
        self._has_model_drafts = False  # in the next step
        self._beams = BeamSequences(self._scheduler, info.vocab_size, self._seq_ids, self._add_sequence)
        self.running = self._scheduler.running  # the sequences that have places, to be read only
        self._requests: dict[str, RequestState] = {}
        self._queue = RequestQueue(self.limits, info.max_num_seqs, self.stats)
        self._aborted: list[RequestState] = []  # they end at the next step boundary
        self._steps: deque[Step] = deque()  # under way: one, or with that decided ahead two
        self._last_end = -math.inf

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def continue_stats(self, stats: EngineStats) -> None:
        """Continue the statistics of an engine that served the same model before. Call it before the first request."""
        self.stats = self._queue.stats = stats

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request of plain integer ids that even an idle engine could not serve."""
        admit(request, self.info, self.limits)

    def add_request(self, request: Request, sink: Sink, text_sink: TextSink | None = None) -> None:
        """Queue a request. Raises `RequestError` at once for one that is wrong, can never fit or finds a full queue."""
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id} is in use already", param="request_id")
        check_prepared(request)
        params = request.params
        if params.logits_processors:
            params = msgspec.structs.replace(params, logits_processors=())  # code is not sent to ranks
        request = msgspec.structs.replace(
            request,
            params=params,
            prompt_token_ids=list(request.prompt_token_ids),
            group=request.group or request.request_id,
        )
        max_tokens, warnings = admit(request, self.info, self.limits)
        has_room = request.is_exempt_from_queue_timeout or len(self._queue) < self.limits.max_waiting
        displaced = None if has_room else self._queue.make_room(request)
        seed, pooling = params.seed, request.pooling
        ends: dict[int, int | None] = {} if params.ignore_eos else dict.fromkeys(self.tokenizer.eos_token_ids)
        state = RequestState(
            request=request,
            output=RequestOutput(
                request_id=request.request_id,
                prompt=request.prompt,
                prompt_token_ids=request.prompt_token_ids,
                outputs=[],
                warnings=warnings,
            ),
            max_tokens=max_tokens,
            ends=ends | {token_id: token_id for token_id in params.stop_token_ids},
            sink=sink,
            text_sink=text_sink if params.n == 1 and params.logprobs is None else None,
            seed=secrets.randbits(64) if seed is None else seed % 2**64,
            arrival_time=self._clock(),
            cache_root=self._cache_root(request),
            priority=request.priority,
            pooling=None if pooling is None else pooling.pooling or ("mean" if self.info.pooling == "mean" else "last"),
        )
        # Siblings wait until the first prompt is cached: n=8 then costs one prefill, not eight.
        seq = self._beams.begin(state) if request.params.use_beam_search else self._add_sequence(state)
        if displaced is not None:  # only now: nothing refuses the new request any more
            self._end_with_error(*displaced)
        self._requests[request.request_id] = self._queue[request.request_id] = state
        self._scheduler.add(seq)

    def encode_bad_words(self, params: SamplingParams) -> tuple[TokenIds, ...] | None:
        """The tokens of `params.bad_words`, for `Request.bad_words`; None without any. Any thread may call it.

        Raises `InvalidRequest` for too many words, or a word that is too long.
        """
        return encode_bad_words(params.bad_words, self.tokenizer, self.limits) if params.bad_words else None

    def abort(self, request_id: str) -> None:
        """End a request as "abort" at the next step boundary, whatever it is doing. Unknown ids are ignored."""
        state = self._requests.get(request_id)
        if state is not None and not state.is_aborted:
            state.is_aborted = True
            self._aborted.append(state)

    def schedule(self) -> Batch | None:
        """Decide the next step; None if there is nothing to compute. Aborted and overdue requests end here.

        Raises `EngineError` while a step is under way.
        """
        if self._steps:
            raise EngineError("schedule was called before update or fail ended the last step")
        self._end_aborted()
        self._end_overdue()
        return self._decide()

    def plan_drafts(self) -> DraftPlan | None:
        """What `draft_model.run` must compute on the step thread before `schedule`; None if it makes no draft.

        Its result goes to `take_drafts`. Requests may be added and aborted meanwhile.
        """
        return self._scheduler.plan_drafts(self._clock())

    def draft_freely(self) -> None:
        """Draft wherever there is a draft, whatever it costs: to test that drafts change no answer."""
        self._scheduler.speculation.draft_freely()

    def take_drafts(self, plan: DraftPlan, drafts: dict[int, list[int]] | None) -> None:
        """Store the draft model's drafts. The next step verifies them."""
        assert self.draft_model is not None, "it made the plan"
        self.draft_model.take_in(plan, drafts, self._clock())
        self._has_model_drafts = True
        self.stats.draft_model_failures += drafts is None

    def schedule_ahead(self) -> Batch | None:
        """Decide the step after the one under way; None if that one must end first, by `update` or `fail`.

        A backend that `CanRunAhead` computes it behind that one. Aborted and overdue requests end here too.
        Raises `EngineError` unless just one step is under way.
        """
        if len(self._steps) != 1:
            raise EngineError(f"schedule_ahead was called with {len(self._steps)} steps under way")
        self._end_aborted()
        self._end_overdue()
        batch = self._decide() if self._scheduler.can_schedule_ahead() else None
        self.stats.steps_ahead += batch is not None
        return batch

    def _decide(self) -> Batch | None:
        num_preemptions = self._scheduler.num_preemptions
        runs, start = self._scheduler.schedule(self._clock()), self._clock()
        self.stats.preemptions += self._scheduler.num_preemptions - num_preemptions
        seqs, guided, processors = list[ScheduledSeq](), list[GuidedSeq](), dict[int, LogitsProcessors]()
        for seq, num_tokens in runs.items():
            if not seq.is_started:
                self._note_started(seq, start)
            seqs.append(scheduled_seq(seq, num_tokens))
            if seq.is_plain or seqs[-1].sampling is None:
                continue  # nothing else decides its draw, or nothing is drawn after this chunk of its prompt
            if seq.matcher is not None:
                guided.append(GuidedSeq(seq.seq_id, seq.matcher, seq.draft_token_ids))
            if seq.processors is not None:
                seq.processors.begin(seq.token_ids[seq.num_prompt_tokens :])
                processors[seq.seq_id] = seq.processors
        self._set_gauges()
        if not runs:
            return None
        self.guidance = guidance = StepGuidance(self.info.vocab_size, guided) if guided else None
        batch = Batch(seqs, None if guidance is None else guidance.masks, processors or None)
        for seq, num_tokens in runs.items():
            seq.num_in_flight_tokens += num_tokens
        self._steps.append(Step(runs, guidance, processors, start, is_ahead=bool(self._steps)))
        return batch

    def _note_started(self, seq: Sequence, now: float) -> None:
        """Note that a sequence is in its first step. With the last one of its request, that leaves the queue."""
        state = seq.state
        seq.is_started = True
        state.num_started += 1
        if not state.is_queued:
            self._queue.pop(state.request.request_id, None)
        if state.scheduled_time is None:
            state.scheduled_time = now
            state.output.num_cached_tokens = seq.num_computed_tokens
            self.stats.note_scheduled(state, now)

    def update(self, result: StepResult) -> None:
        """Apply the result of the first step under way, and pass each of its requests its delta."""
        now, step = self._clock(), self._steps[0]  # under way until its result can be applied
        if step.guidance is not None:
            step.guidance.advance(result)
        seconds = self._measure(step, result, now)
        self._scheduler.end_step(self._steps.popleft().runs)
        num_prompt, num_generated = self.stats.prompt_tokens, self.stats.generation_tokens
        later = dict[RequestState, None]()  # requests whose other sequences may follow in this step
        for (seq, num_tokens), seq_result in zip(step.runs.items(), result.seqs, strict=True):
            state = seq.state
            if seq.status == "running":
                self._take_in(seq, num_tokens, seq_result, now)
            if len(state.sequences) == 1 and state.search is None:
                if state.output.outputs:
                    self._deliver(state)  # while its delta is still in the processor's cache
            else:
                later[state] = None
        num_generated = self.stats.generation_tokens - num_generated
        self.stats.generation_rate.add(num_generated)
        # As in vLLM: a prompt counts whole in the step that ends it, cached tokens included.
        self.stats.note_step(self.stats.prompt_tokens - num_prompt + num_generated, seconds)
        for state in later:
            if state.search is not None and self._requests.get(state.request.request_id) is state:
                self._beams.advance(state, state.search, now)
            self._deliver(state)
        if self._aborted:
            self._end_aborted()
        self._set_gauges()

    def _measure(self, step: Step, result: StepResult, now: float) -> float:
        """Give the time of a step that ends now to what estimates the cost of steps. Returns its seconds."""
        between, seconds = now - self._last_end, now - max(step.start, self._last_end)
        self._last_end = now
        self.stats.num_step_threads = result.num_threads
        self.stats.host_draws += result.num_host_draws
        computing = seconds
        if step.processors:
            computing -= self._processor_times.note(step.processors.values(), self.stats)
        has_model_drafts, self._has_model_drafts = self._has_model_drafts, False
        if max(step.runs.values()) > 1:
            if self._scheduler.pace is not None:
                chunks = [(seq.num_computed_tokens, num + len(seq.draft_token_ids)) for seq, num in step.runs.items()]
                self._scheduler.pace.observe(chunks, computing)
            return seconds
        speculation = self._scheduler.speculation
        if not self.may_draft or len(step.runs) > self.config.max_draft_seqs:
            return seconds
        num_rows = sum(1 + len(seq.draft_token_ids) for seq in step.runs)
        if self.draft_model is not None:
            self.draft_model.cost.observe_step(num_rows, computing)
        if step.guidance or step.processors:
            return seconds
        if speculation.wait_cost is None:
            speculation.step_costs.observe(num_rows, computing, has_drafts=num_rows > len(step.runs))
        elif not has_model_drafts and (step.is_ahead or all(seq.num_output_tokens for seq in step.runs)):
            speculation.wait_cost.observe(num_rows, between, is_ahead=step.is_ahead)
        return seconds

    def fail(self, error: Exception) -> None:
        """Note that the first step under way raised: its requests end with an `EngineError`, the others continue."""
        runs = self._steps.popleft().runs
        self._scheduler.end_step(runs)
        self.stats.step_failures += 1
        logger.error("a step of %d sequences failed", len(runs), exc_info=error)
        for state in dict.fromkeys(seq.state for seq in runs):
            self._end_with_error(state, EngineError("the model step failed; the request was not completed"))
        self._set_gauges()

    def end_all(self, make_error: Callable[[], BrliteError]) -> None:
        """End each request with an error of its own: a shared one would collect the tracebacks of all readers.

        Results of the steps under way must not be passed to `update` afterwards.
        """
        while self._steps:
            self._scheduler.end_step(self._steps.popleft().runs)
        for state in list(self._requests.values()):
            self._end_with_error(state, make_error())
        self._set_gauges()

    def reset(self) -> None:
        """Drop all requests, without a word to their sinks, and all cached blocks.

        For the state that an interrupt leaves, such as Ctrl-C: it may come between any two lines of the engine.
        """
        draft = self.draft_model
        self._begin(None if draft is None else draft.backend)
        if draft is not None and self.draft_model is not None:
            self.draft_model.is_off = draft.is_off
        self._set_gauges()

    def check_idle(self) -> None:
        """Raise `EngineError` if an engine without requests and steps still holds something. Costs nothing."""
        if not (self._requests or self._steps or (self._scheduler.is_empty and self._blocks.num_used == 0)):
            raise EngineError(f"{self._blocks.num_used} blocks are held, but no request is left")

    def check_integrity(self) -> None:
        """Raise `EngineError` if a block is lost, owned twice, or owned by no sequence. Reads every block."""
        in_flight = (seq for step in self._steps for seq in step.runs)
        self._blocks.check_integrity(dict.fromkeys([*self._scheduler.running, *in_flight]))
        if self.draft_model is not None:
            self.draft_model.check_integrity()
        self.check_idle()

    def longest_waits(self) -> dict[int, float]:
        """For each `priority` of requests, the seconds that its longest waiting sequence has waited, 0 without one."""
        now, waits = self._clock(), dict[int, float]()
        for state in self._requests.values():
            waiting = [seq.waiting_since for seq in state.sequences if seq.status == "waiting"]
            priority = state.request.priority
            waits[priority] = max(waits.get(priority, 0.0), now - min(waiting, default=now))
        return waits

    def queued(self) -> list[RequestState]:
        """The requests that count towards `max_waiting`: a body with many prompts counts as one."""
        return self._queue.counted()

    def _cache_root(self, request: Request) -> bytes:
        """The digest that a prompt's block digests start from. Prompts with different salts never share a block."""
        salt = request.cache_salt.encode("utf-8", "surrogatepass")
        if not self.config.share_prefix_cache:
            tenant = request.tenant.encode("utf-8", "surrogatepass")
            salt = b"%d:%b%b" % (len(tenant), tenant, salt)  # so no salt of a client can equal that of another tenant
        if not self.config.prefix_caching:
            salt = self._private_salt + request.request_id.encode("utf-8", "surrogatepass") + salt
        return blake2b(salt, digest_size=DIGEST_BYTES).digest()

    def _take_in(self, seq: Sequence, num_tokens: int, result: SeqResult, now: float) -> None:
        state, reason = seq.state, None
        if result.error is not None:
            is_excluded = result.error == Undrawn.NOTHING_ALLOWED.value
            error = (seq.matcher and seq.matcher.error) or (seq.processors and seq.processors.error)
            reason = error or (result.error if is_excluded else None)
            if reason is None:
                self._blocks.unseal(seq)  # the error may come from a chunk that was sealed earlier
                self._end_with_error(state, EngineError(result.error))
                return
        seq.num_computed_tokens += num_tokens
        if seq.num_computed_tokens // self._blocks.block_size > seq.num_sealed_blocks:
            self._blocks.seal(seq)
        if state.prompt_done_time is None:
            self._take_in_prompt(seq, num_tokens, result, now)
        if reason is not None:
            self._end_as_error(seq, reason)
            return
        if not result.tokens:
            return
        if seq.draft_token_ids:
            self.stats.note_draft(len(seq.draft_token_ids), num_accepted=len(result.tokens) - 1)
            seq.steps_saved += len(result.tokens) - 1
            seq.draft_token_ids = []
        if state.search is not None:
            assert result.tokens[0].logprob is not None, "the parameters of a search ask for it"
            state.search.take(seq.seq_id, result.tokens[0].logprob)
            self.stats.note_tokens(1, None)
        elif seq.is_plain and len(result.tokens) == 1:  # as `_append_all`, with a third of its instructions
            token_id, detokenizer = result.tokens[0].token_id, seq.detokenizer
            seq.token_ids.append(token_id)
            text = detokenizer.push(token_id)
            self._give(seq, result.tokens, text, detokenizer.finish_reason, now)
        else:
            self._append_all(seq, result.tokens, now)

    def _take_in_prompt(self, seq: Sequence, num_tokens: int, result: SeqResult, now: float) -> None:
        """Take in what a chunk of a prompt gives beside a token. After the last one queue the other completions."""
        state = seq.state
        if seq.wants_prompt_logprobs:
            state.add_prompt_logprobs(result.prompt_logprobs, is_first=seq.num_computed_tokens == num_tokens)
        seq.hidden_total = result.hidden_total  # with mean pooling: the sum so far
        if not (result.tokens or result.embedding or result.error is not None):
            return
        state.prompt_done_time = now
        state.finish_prompt_logprobs()
        if result.embedding:
            state.output.embedding = array("f", result.embedding)
            self._finish(seq, CompletionOutput(index=seq.index, finish_reason="stop"))
        elif state.search is None:
            self._scheduler.add_siblings([self._add_sequence(state) for _ in range(state.request.params.n - 1)])
        self.stats.note_prompt_done(state, now)

    def _append_all(self, seq: Sequence, tokens: list[SampledToken], now: float) -> None:
        """Append the tokens of one step to a sequence and to its request's delta, up to one that ends the sequence."""
        matcher, detokenizer, token_ids = seq.matcher, seq.detokenizer, seq.token_ids
        begin, text = len(token_ids), ""
        num_before = begin - seq.num_prompt_tokens
        if matcher is not None:  # tokens drawn after the end of the answer are dropped
            tokens = tokens[: matcher.num_tokens - num_before]
        for token in tokens:
            if len(token_ids) > begin:  # the previous token was drafted, so it is computed already
                seq.num_computed_tokens += 1
                self._blocks.seal(seq)
            seq.append(token.token_id)
            text += detokenizer.push(token.token_id)
            if detokenizer.finish_reason is not None:
                break
        finish_reason, num_tokens = detokenizer.finish_reason, len(token_ids) - begin
        if matcher is not None and matcher.is_complete and matcher.num_tokens == num_before + num_tokens:
            text, finish_reason = text + detokenizer.finish(), "stop"
        if num_tokens:
            self._give(seq, tokens[:num_tokens], text, finish_reason, now)
        if matcher is not None and matcher.error is not None and seq.status == "running":
            self._end_as_error(seq, matcher.error)

    def _give(
        self, seq: Sequence, tokens: list[SampledToken], text: str, finish_reason: FinishReason | None, now: float
    ) -> None:
        """Give the text of appended tokens to the text sink, or add it and the tokens to the request's delta."""
        state, num_tokens, is_taken = seq.state, len(tokens), False
        if finish_reason is None and state.text_sink is not None:
            try:
                is_taken = state.text_sink(text, num_tokens)
            except Exception:
                self._drop_reader(state)
                is_taken = True
        if not is_taken:
            delta = CompletionOutput(index=seq.index, text=text, token_ids=[token.token_id for token in tokens])
            if tokens[0].logprob is not None:
                delta.logprobs = [token.logprob for token in tokens if token.logprob is not None]
            if finish_reason is None:
                state.add_delta(delta)
            else:
                delta.finish_reason, delta.stop_reason = finish_reason, seq.detokenizer.stop_reason
                self._finish(seq, delta)
        is_first = len(seq.token_ids) == seq.num_prompt_tokens + num_tokens
        self.stats.note_tokens(num_tokens, None if is_first else now - seq.last_token_time)
        seq.last_token_time = now
        if is_first:
            seq.first_token_time = now

    def _end_as_error(self, seq: Sequence, reason: str) -> None:
        """End one completion for which no token can be drawn. Others of its request continue."""
        logger.warning("a completion of request %s ended: %s", seq.state.request.request_id, reason)
        text = seq.detokenizer.finish()
        self._finish(seq, CompletionOutput(index=seq.index, text=text, finish_reason="error", stop_reason=reason))

    def _finish(self, seq: Sequence, last_delta: CompletionOutput) -> None:
        """End one completion with this last delta. Its place and blocks are free from now on."""
        seq.finish_reason = last_delta.finish_reason
        state = seq.state
        state.add_delta(last_delta)
        self._scheduler.finish(seq)
        state.output.finished = state.is_finished

    def _deliver(self, state: RequestState) -> None:
        """Pass the request's delta to its sink. A finished request is removed first."""
        output = state.output
        if not output.outputs:
            return
        state.output = msgspec.structs.replace(output, outputs=[], prompt_logprobs=None)
        if output.finished:
            del self._requests[state.request.request_id]
            self._queue.pop(state.request.request_id, None)
            now, reason = self._clock(), "abort" if state.is_aborted else state.sequences[0].finish_reason or "stop"
            self.stats.note_finished(state, now, reason)
            output.times = state.times(now)
            state.sequences = []  # else a reference cycle would hold its tokens until the garbage collector runs
        self._send(state, output)

    def _send(self, state: RequestState, output: RequestOutput | BrliteError) -> None:
        try:
            state.sink(output)
        except Exception:
            self._drop_reader(state)

    def _drop_reader(self, state: RequestState) -> None:
        """Abort a request whose sink has raised. Others go on."""
        logger.exception("the reader of request %s failed", state.request.request_id)
        state.sink, state.text_sink = lambda output: None, None
        self.abort(state.request.request_id)

    def _end_aborted(self) -> None:
        aborted, self._aborted = self._aborted, []
        for state in aborted:
            if self._requests.get(state.request.request_id) is not state:
                continue  # it has ended since
            if state.search is not None:
                self._beams.end(state, state.search, self._clock())
            running = [seq for seq in state.sequences if seq.status != "finished"]
            for seq in running:
                self._finish(seq, CompletionOutput(index=seq.index, finish_reason="abort"))
            for index in range(len(state.sequences), state.request.params.n):  # they have no sequences yet
                state.add_delta(CompletionOutput(index=index, finish_reason="abort"))
            self._deliver(state)

    def _end_overdue(self) -> None:
        now = self._clock()
        for state, error in self._queue.overdue(now):
            self._end_with_error(state, error)
        self.stats.promotions += self._scheduler.promote(now - self.limits.max_wait_seconds)

    def _end_with_error(self, state: RequestState, error: BrliteError) -> None:
        if self._requests.pop(state.request.request_id, None) is None:
            return
        self._queue.pop(state.request.request_id, None)
        state.output.outputs = []
        for seq in state.sequences:
            self._scheduler.finish(seq)
        self.stats.note_finished(state, self._clock(), "error")
        state.sequences = []
        self._send(state, error)

    def _set_gauges(self) -> None:
        self.stats.num_running = len(self._scheduler.running)
        self.stats.num_waiting = self._scheduler.waiting.num_waiting
        self.stats.num_used_blocks = self._blocks.num_used
        self.stats.num_blocks = self._blocks.num_blocks

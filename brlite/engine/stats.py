"""The engine's statistics: plain counters and histograms. `server/metrics.py` renders them in a metric format.

Bucket bounds include every bound of vLLM 0.4.0.post1 and of its V1 engine, so old and new dashboards both work.
All times are seconds.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

from brlite.engine.request import RequestState

TTFT_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_BOUNDS = (1, 2, 5, 10, 20)
RATE_SECONDS = 5.0


def length_bounds(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 … up to `max_model_len`."""
    series = (digit * 10**power for power in range(len(str(max_model_len))) for digit in (1, 2, 5))
    return tuple(bound for bound in series if bound <= max_model_len)


class Histogram:
    """Counts of values by upper bound; `counts` has one more entry than `bounds`, for values above the last."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def mean(self, default: float) -> float:
        """The mean of all values; `default` if there are none."""
        num = sum(self.counts)
        return self.total / num if num else default


class Rate:
    """Events per second over the last `RATE_SECONDS` that are complete; falls to 0 when nothing happens."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self._count = 0
        self._rate = 0.0

    def add(self, count: int) -> None:
        self._advance()
        self._count += count

    @property
    def value(self) -> float:
        self._advance()
        return self._rate

    def _advance(self) -> None:
        elapsed = self._clock() - self._start
        if elapsed >= RATE_SECONDS:
            self._rate = self._count / elapsed
            self._start += elapsed
            self._count = 0


class EngineStats:
    """Gauges are set at each step, counters only grow, histograms take one value per event."""

    def __init__(self, max_model_len: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_running = 0
        self.num_waiting = 0
        self.num_used_blocks = 0
        self.num_blocks = 0
        self.num_step_threads = 0

        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.preemptions = 0
        self.promotions = 0
        self.drafts = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.accepted_by_position: Counter[int] = Counter()  # 0: the first draft token of a draft
        self.draft_model_failures = 0
        self.step_failures = 0
        self.engine_failures = 0
        self.host_draws = 0  # tokens that the host drew while a device that runs ahead waited
        self.logits_processor_calls = 0
        self.logits_processor_seconds = 0.0
        self.steps_ahead = 0  # steps scheduled before the result of the previous step was known
        self.finished: Counter[str] = Counter()
        self._latencies: list[float] = []  # of the step's tokens: sequences that run together have the same
        self.prompt_rate = Rate(clock)
        self.generation_rate = Rate(clock)

        self.time_to_first_token = Histogram(TTFT_BOUNDS)
        self.inter_token_latency = Histogram(TOKEN_BOUNDS)
        self.time_per_output_token = Histogram(TOKEN_BOUNDS)
        self.e2e_latency = Histogram(REQUEST_BOUNDS)
        self.queue_time = Histogram(REQUEST_BOUNDS)
        self.prefill_time = Histogram(REQUEST_BOUNDS)
        self.decode_time = Histogram(REQUEST_BOUNDS)
        self.inference_time = Histogram(REQUEST_BOUNDS)
        self.step_tokens = Histogram(STEP_TOKENS_BOUNDS)
        self.step_time = Histogram(TOKEN_BOUNDS)
        self.params_n = Histogram(NUM_BOUNDS)
        self.prompt_length = Histogram(length_bounds(max_model_len))
        self.generation_length = Histogram(length_bounds(max_model_len))
        self.longest_length = Histogram(length_bounds(max_model_len))
        self.max_tokens = Histogram(length_bounds(max_model_len))

    def note_scheduled(self, state: RequestState, now: float) -> None:
        """Record that a request's first sequence enters its first step."""
        self.queue_time.observe(now - state.arrival_time)
        self.prefix_cache_queries += len(state.request.prompt_token_ids)
        self.prefix_cache_hits += state.output.num_cached_tokens

    def note_prompt_done(self, state: RequestState, now: float) -> None:
        """Record that a request's prompt is computed, with its first token or its embedding."""
        self.prompt_tokens += len(state.request.prompt_token_ids)
        self.prompt_rate.add(len(state.request.prompt_token_ids))
        self.cached_prompt_tokens += state.output.num_cached_tokens
        if state.pooling is None:
            self.time_to_first_token.observe(now - state.arrival_time)
        self.prefill_time.observe(now - (state.scheduled_time or now))

    def note_tokens(self, num_tokens: int, seconds: float | None) -> None:
        """Record a step's tokens of a sequence, `seconds` after its previous one if any: an equal part for each."""
        self.generation_tokens += num_tokens
        if seconds is None:
            return
        if num_tokens == 1:
            self._latencies.append(seconds)
        else:
            self._latencies += [seconds / num_tokens] * num_tokens

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Record a step: its duration and its tokens, as vLLM counts them. Call it after the step's `note_tokens`."""
        self.step_time.observe(seconds)
        self.step_tokens.observe(num_tokens)
        for latency, times in Counter(self._latencies).items():
            self.inter_token_latency.observe(latency, times)
        self._latencies.clear()

    def note_draft(self, num_tokens: int, num_accepted: int) -> None:
        """Record that a step verified the draft of a sequence."""
        self.drafts += 1
        self.draft_tokens += num_tokens
        self.accepted_tokens += num_accepted
        self.accepted_by_position.update(range(num_accepted))

    def note_finished(self, state: RequestState, now: float, reason: str) -> None:
        """Record the end of a request. Latencies only of completed requests; aborts and errors are only counted."""
        self.finished[reason] += 1
        if reason not in ("stop", "length"):
            return
        self.e2e_latency.observe(now - state.arrival_time)
        self.inference_time.observe(now - (state.scheduled_time or now))
        self.prompt_length.observe(len(state.request.prompt_token_ids))
        if state.pooling is not None:  # nothing was generated
            return
        for seq in state.sequences:
            self.generation_length.observe(seq.num_output_tokens)
            if seq.num_output_tokens > 1:
                mean = (seq.last_token_time - seq.first_token_time) / (seq.num_output_tokens - 1)
                self.time_per_output_token.observe(mean)
        self.decode_time.observe(now - (state.prompt_done_time or now))
        self.longest_length.observe(max(seq.num_output_tokens for seq in state.sequences))
        self.params_n.observe(state.request.params.n)
        self.max_tokens.observe(state.max_tokens)

"""The engine's numbers, kept as plain counters and histograms. Knows no metric format; `server/metrics.py` renders it.

Bucket bounds hold every bound of vLLM 0.4.0.post1 and of its V1 engine, so old and new dashboards both find theirs.
All times are seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

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

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def _histogram(bounds: tuple[float, ...]) -> Histogram:
    return field(default_factory=lambda: Histogram(bounds))  # type: ignore[return-value]


@dataclass
class EngineStats:
    """Gauges are set at each step, counters only grow, histograms take one value per event."""

    max_model_len: int

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_used_blocks: int = 0

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    step_failures: int = 0
    finished: Counter[str] = field(default_factory=Counter)

    time_to_first_token: Histogram = _histogram(TTFT_BOUNDS)
    inter_token_latency: Histogram = _histogram(TOKEN_BOUNDS)
    time_per_output_token: Histogram = _histogram(TOKEN_BOUNDS)
    e2e_latency: Histogram = _histogram(REQUEST_BOUNDS)
    queue_time: Histogram = _histogram(REQUEST_BOUNDS)
    prefill_time: Histogram = _histogram(REQUEST_BOUNDS)
    decode_time: Histogram = _histogram(REQUEST_BOUNDS)
    inference_time: Histogram = _histogram(REQUEST_BOUNDS)
    step_tokens: Histogram = _histogram(STEP_TOKENS_BOUNDS)
    step_time: Histogram = _histogram(TOKEN_BOUNDS)
    params_n: Histogram = _histogram(NUM_BOUNDS)
    prompt_length: Histogram = field(init=False)
    generation_length: Histogram = field(init=False)
    max_tokens: Histogram = field(init=False)

    def __post_init__(self) -> None:
        bounds = length_bounds(self.max_model_len)
        self.prompt_length = Histogram(bounds)
        self.generation_length = Histogram(bounds)
        self.max_tokens = Histogram(bounds)

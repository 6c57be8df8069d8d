"""`/metrics`: the engines' statistics in Prometheus's format.

Three sets of families from the same numbers: the 13 families of vLLM 0.4.0.post1 with their own label set, the names of
vLLM's V1 engine (labels `model_name` and `engine`), and brlite's own. There is no global registry: every scrape reads
the engines' `EngineStats`, so two applications in one process share no metrics.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from aiohttp import web
from prometheus_client import GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from brlite.engine.async_engine import EngineLoop
from brlite.engine.stats import EngineStats, Histogram
from brlite.http.api_key import KeyUsage
from brlite.http.keys import ApiKeys
from brlite.process.output import num_dropped_lines
from brlite.server.response_store import ResponseStore
from brlite.server.served_model import ModelTable, ServedModel

# Further collectors to render, such as those of the proxy.
COLLECTORS: web.AppKey[Iterable[Collector]] = web.AppKey("collectors")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ENDINGS = ("stop", "length", "abort", "error")


S = TypeVar("S")
# Families: of each the name, the help text, and a function that reads its value.
Rows = list[tuple[str, str, Callable[[S], float]]]
Histograms = list[tuple[str, str, Callable[[EngineStats], Histogram]]]


def _kv_usage(stats: EngineStats) -> float:
    return stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0


# vLLM 0.4.0.post1: exactly these names, types and the label model_name. Swapping does not exist here: always 0.
VLLM_04_GAUGES: Rows[EngineStats] = [
    ("vllm:num_requests_running", "Sequences that are being computed.", lambda s: s.num_running),
    ("vllm:num_requests_swapped", "Always 0: nothing is swapped out.", lambda s: 0),
    ("vllm:num_requests_waiting", "Sequences that wait to be computed.", lambda s: s.num_waiting),
    ("vllm:gpu_cache_usage_perc", "Part of the KV cache in use, 0 to 1, wherever it lies.", _kv_usage),
    ("vllm:cpu_cache_usage_perc", "Always 0: there is no swap space.", lambda s: 0),
    ("vllm:avg_prompt_throughput_toks_per_s", "Prompt tokens per second, lately.", lambda s: s.prompt_rate.value),
    (
        "vllm:avg_generation_throughput_toks_per_s",
        "Generated tokens per second, lately.",
        lambda s: s.generation_rate.value,
    ),
]
VLLM_04_COUNTERS: Rows[EngineStats] = [
    ("vllm:prompt_tokens", "Prompt tokens processed.", lambda s: s.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
]
VLLM_04_HISTOGRAMS: Histograms = [
    ("vllm:time_to_first_token_seconds", "Arrival to first token.", lambda s: s.time_to_first_token),
    ("vllm:time_per_output_token_seconds", "Token to token.", lambda s: s.inter_token_latency),
    ("vllm:e2e_request_latency_seconds", "Arrival to end.", lambda s: s.e2e_latency),
]

# vLLM's V1 engine. Names that are also in the set above are not repeated.
V1_GAUGES: Rows[EngineStats] = [("vllm:kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", _kv_usage)]
V1_COUNTERS: Rows[EngineStats] = [
    ("vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prefix_cache_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found.", lambda s: s.prefix_cache_hits),
    ("vllm:gpu_prefix_cache_queries", "The same, by an older name.", lambda s: s.prefix_cache_queries),
    ("vllm:gpu_prefix_cache_hits", "The same, by an older name.", lambda s: s.prefix_cache_hits),
    ("vllm:prompt_tokens_cached", "Prompt tokens not computed.", lambda s: s.cached_prompt_tokens),
    ("vllm:num_preemptions", "Sequences put back to be computed again.", lambda s: s.preemptions),
    ("vllm:spec_decode_num_drafts", "Drafts verified: one a sequence and step.", lambda s: s.drafts),
    ("vllm:spec_decode_num_draft_tokens", "Draft tokens.", lambda s: s.draft_tokens),
    ("vllm:spec_decode_num_accepted_tokens", "Draft tokens that were right.", lambda s: s.accepted_tokens),
]
V1_HISTOGRAMS: Histograms = [
    ("vllm:inter_token_latency_seconds", "Token to token.", lambda s: s.inter_token_latency),
    ("vllm:request_time_per_output_token_seconds", "A request's mean.", lambda s: s.time_per_output_token),
    ("vllm:request_queue_time_seconds", "Arrival to first step.", lambda s: s.queue_time),
    ("vllm:request_prefill_time_seconds", "First step to first token.", lambda s: s.prefill_time),
    ("vllm:request_decode_time_seconds", "First token to end.", lambda s: s.decode_time),
    ("vllm:request_inference_time_seconds", "First step to end.", lambda s: s.inference_time),
    ("vllm:iteration_tokens_total", "Prompt tokens done and tokens generated in a step.", lambda s: s.step_tokens),
    ("vllm:request_prompt_tokens", "Prompt tokens of a request.", lambda s: s.prompt_length),
    ("vllm:request_generation_tokens", "Tokens of a completion.", lambda s: s.generation_length),
    (
        "vllm:request_max_num_generation_tokens",
        "Tokens of the longest completion.",
        lambda s: s.longest_length,
    ),
    ("vllm:request_params_max_tokens", "max_tokens of a request.", lambda s: s.max_tokens),
    ("vllm:request_params_n", "n of a request.", lambda s: s.params_n),
]

OWN_GAUGES: Rows[EngineStats] = [
    ("brlite:step_threads", "Threads that computed the last step.", lambda s: s.num_step_threads)
]
OWN_COUNTERS: Rows[EngineStats] = [
    ("brlite:step_failures", "Steps that raised.", lambda s: s.step_failures),
    ("brlite:engine_failures", "Errors of the engine between steps, lost blocks.", lambda s: s.engine_failures),
    ("brlite:steps_ahead", "Steps decided before the one before had ended.", lambda s: s.steps_ahead),
    ("brlite:promotions", "Requests moved to the first class: they waited too long.", lambda s: s.promotions),
    ("brlite:draft_model_failures", "Draft models given up after an error.", lambda s: s.draft_model_failures),
    ("brlite:logits_processor_calls", "Calls of logits processors.", lambda s: s.logits_processor_calls),
    ("brlite:logits_processor_seconds", "Seconds in these calls.", lambda s: s.logits_processor_seconds),
    ("brlite:host_draws", "Tokens that the host drew while a card waited.", lambda s: s.host_draws),
]
OWN_HISTOGRAMS: Histograms = [("brlite:step_time_seconds", "Duration of a step.", lambda s: s.step_time)]

MODEL_COUNTERS: Rows[ServedModel] = [
    ("brlite:model_loads", "Times that the model was loaded.", lambda m: m.num_loads),
    ("brlite:model_unloads", "Times that its memory was given back.", lambda m: m.num_unloads),
]
MODEL_GAUGES: Rows[ServedModel] = [
    ("brlite:model_loaded", "1 while the model is loaded, else 0.", lambda m: m.engine is not None)
]

KEY_OUTCOMES: dict[str, Callable[[KeyUsage], float]] = {
    "admitted": lambda u: u.num_admitted,
    "rate_limited": lambda u: u.num_rate_limited,
    "forbidden": lambda u: u.num_forbidden,
}
KEY_TOKENS: dict[str, Callable[[KeyUsage], float]] = {
    "prompt": lambda u: u.prompt_tokens,
    "completion": lambda u: u.completion_tokens,
}
KEY_SECONDS: dict[str, Callable[[KeyUsage], float]] = {
    "queue": lambda u: u.queue_seconds,
    "prefill": lambda u: u.prefill_seconds,
    "decode": lambda u: u.decode_seconds,
}

MODEL_LABELS = ("model_name",)
V1_LABELS = ("model_name", "engine")


class EngineCollector(Collector):
    """Renders the models of a table. Before a model is loaded its numbers are 0, so that no alert fires on absence.

    The counters of an unloaded model stay; its gauges show that nothing runs or waits.
    """

    def __init__(self, models: ModelTable) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        models = [([model.name], model) for model in self._models]
        stats = [([model.name], model.stats) for model in self._models]
        v1 = [([model.name, "0"], model.stats) for model in self._models]
        yield self._cache_config()
        yield from _families(GaugeMetricFamily, VLLM_04_GAUGES, MODEL_LABELS, stats)
        yield from _families(CounterMetricFamily, VLLM_04_COUNTERS, MODEL_LABELS, stats)
        yield from _histograms(VLLM_04_HISTOGRAMS, MODEL_LABELS, stats)
        yield from _families(GaugeMetricFamily, V1_GAUGES, V1_LABELS, v1)
        yield from _families(CounterMetricFamily, V1_COUNTERS, V1_LABELS, v1)
        yield from _histograms(V1_HISTOGRAMS, V1_LABELS, v1)
        yield from self._divided()
        yield from _families(GaugeMetricFamily, OWN_GAUGES, MODEL_LABELS, stats)
        yield from _families(CounterMetricFamily, OWN_COUNTERS, MODEL_LABELS, stats)
        yield from _histograms(OWN_HISTOGRAMS, MODEL_LABELS, stats)
        yield from _families(CounterMetricFamily, MODEL_COUNTERS, MODEL_LABELS, models)
        yield from _families(GaugeMetricFamily, MODEL_GAUGES, MODEL_LABELS, models)
        yield from self._loaded()

    def _engines(self) -> Iterator[tuple[str, EngineLoop]]:
        for model in self._models:
            if model.engine is not None:
                yield model.name, model.engine

    def _cache_config(self) -> Metric:
        # vLLM 0.4.0's labels do not name the model: models with the same settings share a line.
        family = InfoMetricFamily("vllm:cache_config", "How the KV cache is set up.")
        setups = []
        for _, engine in self._engines():
            info = engine.info
            is_card = info.name == "torch" and not info.device.startswith("cpu")
            values = {
                "block_size": info.block_size,
                "cache_dtype": info.kv_dtype,
                "enable_prefix_caching": engine.config.prefix_caching,
                "forced_num_gpu_blocks": None,
                "gpu_memory_utilization": engine.config.gpu_memory_utilization if is_card else None,
                "num_cpu_blocks": 0,
                "num_gpu_blocks": info.num_blocks,
                "sliding_window": info.sliding_window,
                "swap_space_bytes": 0,
            }
            setup = {name: str(value) for name, value in values.items()}
            if setup not in setups:
                setups.append(setup)
                family.add_metric([], setup)
        return family

    def _divided(self) -> Iterator[Metric]:
        """Families of the V1 engine that split a number by one more label."""
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by how.", labels=(*V1_LABELS, "finished_reason")
        )
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "All wait for room.", labels=(*V1_LABELS, "reason")
        )
        sources = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where they came from.", labels=(*V1_LABELS, "source")
        )
        accepted = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that were right, by their place in the draft.",
            labels=(*V1_LABELS, "position"),
        )
        sleep = GaugeMetricFamily(
            "vllm:engine_sleep_state",
            "awake while the model is loaded, else discard_all.",
            labels=(*V1_LABELS, "sleep_state"),
        )
        for model in self._models:
            values, stats = [model.name, "0"], model.stats
            for ending in ENDINGS:
                ended.add_metric([*values, ending], stats.finished[ending])
            waiting.add_metric([*values, "capacity"], stats.num_waiting)
            waiting.add_metric([*values, "deferred"], 0)
            sources.add_metric([*values, "local_compute"], stats.prompt_tokens - stats.cached_prompt_tokens)
            sources.add_metric([*values, "local_cache_hit"], stats.cached_prompt_tokens)
            sources.add_metric([*values, "external_kv_transfer"], 0)
            for position, num_accepted in sorted(stats.accepted_by_position.items()):
                accepted.add_metric([*values, str(position)], num_accepted)
            sleep.add_metric([*values, "awake"], model.engine is not None)
            sleep.add_metric([*values, "weights_offloaded"], 0)
            sleep.add_metric([*values, "discard_all"], model.engine is None)
        yield from (ended, waiting, sources, accepted, sleep)

    def _loaded(self) -> Iterator[Metric]:
        """Families of the models that are loaded."""
        labels = ("model_name", "backend", "device", "dtype", "precision")
        backends = GaugeMetricFamily("brlite:backend_info", "What computes the steps; 1.", labels=labels)
        waits = GaugeMetricFamily(
            "brlite:longest_wait_seconds",
            "How long the longest waiting request of a priority has waited.",
            labels=(*MODEL_LABELS, "priority"),
        )
        for name, engine in self._engines():
            info = engine.info
            backends.add_metric([name, info.name, info.device, info.dtype, info.precision], 1)
            for priority, seconds in {0: 0.0, **engine.longest_waits()}.items():
                waits.add_metric([name, str(priority)], seconds)
        yield from (backends, waits)


def _families(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    rows: Rows[S],
    labels: tuple[str, ...],
    subjects: list[tuple[list[str], S]],
) -> Iterator[Metric]:
    """A family for each row. It has a sample for each of `subjects`: its values of the labels, and what is read."""
    for name, about, value in rows:
        family = kind(name, about, labels=labels)
        for values, subject in subjects:
            family.add_metric(values, value(subject))
        yield family


def _histograms(
    rows: Histograms, labels: tuple[str, ...], subjects: list[tuple[list[str], EngineStats]]
) -> Iterator[Metric]:
    for name, about, value in rows:
        family = HistogramMetricFamily(name, about, labels=labels)
        for values, stats in subjects:
            histogram = value(stats)
            bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
            buckets = list(zip(bounds, map(float, itertools.accumulate(histogram.counts)), strict=True))
            family.add_metric(values, buckets=buckets, sum_value=histogram.total)
        yield family


class KeyCollector(Collector):
    """Renders the usage of each named key, with the name as label."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def collect(self) -> Iterable[Metric]:
        yield self._family("brlite:key_requests", "Requests of a key, by what became of them.", "outcome", KEY_OUTCOMES)
        yield self._family("brlite:key_tokens", "Tokens that a key has used.", "kind", KEY_TOKENS)
        about = "Time that a key's requests to local models took."
        yield self._family("brlite:key_seconds", about, "phase", KEY_SECONDS)
        weights = GaugeMetricFamily(
            "brlite:key_weight", "Its turns for each turn of a key of weight 1.", labels=["key"]
        )
        about = "The class of its requests; lower ones go first."
        priorities = GaugeMetricFamily("brlite:key_priority", about, labels=["key"])
        for key in self._keys:
            weights.add_metric([key.name], key.weight)
            priorities.add_metric([key.name], key.priority)
        yield from (weights, priorities)

    def _family(self, name: str, about: str, label: str, rows: dict[str, Callable[[KeyUsage], float]]) -> Metric:
        family = CounterMetricFamily(name, about, labels=("key", label))
        for key in self._keys:
            for value, read in rows.items():
                family.add_metric([key.name, value], read(key.usage))
        return family


class ResponseStoreCollector(Collector):
    """Renders the fill level of the response store, without names of models or keys."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        store = self._store
        yield GaugeMetricFamily("brlite:stored_responses", "Responses in the store.", value=len(store))
        yield GaugeMetricFamily("brlite:stored_response_bytes", "Bytes that they take.", value=store.num_bytes)
        about = "Responses that were forgotten because the store was full."
        yield CounterMetricFamily("brlite:responses_forgotten", about, value=store.num_forgotten)


class OutputCollector(Collector):
    """Renders how much of the process's own output was lost."""

    def collect(self) -> Iterable[Metric]:
        about = "Lines of the log that were dropped, since they could not be written in time or at all."
        yield CounterMetricFamily("brlite:log_lines_dropped", about, value=num_dropped_lines())


def named_collectors(models: ModelTable, keys: ApiKeys, more: Iterable[Collector]) -> list[Collector]:
    """The collectors that show names of models, keys or upstreams."""
    return [EngineCollector(models), KeyCollector(keys), *more]


def render(collectors: Iterable[Collector]) -> tuple[bytes, str]:
    """The metrics of these collectors and of the process in Prometheus's text format 0.0.4, and the content type.

    Never OpenMetrics, even if the client accepts it: prometheus_client 0.23 to 0.26 writes `vllm_` for `vllm:` there.
    """
    registry = CollectorRegistry(auto_describe=False)
    for collector in (OutputCollector(), *collectors):
        registry.register(collector)
    for of_process in (ProcessCollector, PlatformCollector, GCCollector):
        of_process(registry=registry)
    return generate_latest(registry), CONTENT_TYPE

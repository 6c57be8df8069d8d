"""`/metrics`: both generations of vLLM's names, there from the start, fed by the same numbers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import aiohttp
import msgspec
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from brlite.app import create_app
from brlite.config.options import Config, LimitsConfig, ModelSpec
from brlite.engine.backend import ScheduledSeq
from brlite.engine.stats import RATE_SECONDS, Rate
from brlite.http.listen import HttpServer
from brlite.server.served_model import ModelTable, ServedModel
from tests.fakes import FakeBackend
from tests.server.conftest import MODEL, Client

# vLLM 0.4.0.post1, as it was seen on the wire: name, type, and the bounds its buckets must have.
VLLM_04_FAMILIES = {
    "vllm:cache_config_info": ("gauge", ()),
    "vllm:num_requests_running": ("gauge", ()),
    "vllm:num_requests_swapped": ("gauge", ()),
    "vllm:num_requests_waiting": ("gauge", ()),
    "vllm:gpu_cache_usage_perc": ("gauge", ()),
    "vllm:cpu_cache_usage_perc": ("gauge", ()),
    "vllm:prompt_tokens": ("counter", ()),
    "vllm:generation_tokens": ("counter", ()),
    "vllm:time_to_first_token_seconds": (
        "histogram",
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    ),
    "vllm:time_per_output_token_seconds": (
        "histogram",
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ),
    "vllm:e2e_request_latency_seconds": ("histogram", (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)),
    "vllm:avg_prompt_throughput_toks_per_s": ("gauge", ()),
    "vllm:avg_generation_throughput_toks_per_s": ("gauge", ()),
}
V1_FAMILIES = [
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:request_success",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_max_tokens",
    "vllm:request_params_n",
    "vllm:iteration_tokens_total",
    "vllm:request_max_num_generation_tokens",
    "vllm:gpu_prefix_cache_hits",
    "vllm:gpu_prefix_cache_queries",
    "vllm:num_requests_waiting_by_reason",
    "vllm:prompt_tokens_by_source",
    "vllm:engine_sleep_state",
]


async def scrape(client: Client, path: str = "/metrics") -> dict[str, Metric]:
    async with client.session.get(client.url + path, allow_redirects=False) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(family: Metric, suffix: str = "", **labels: str) -> float:
    matching = [s for s in family.samples if s.name == family.name + suffix and labels.items() <= s.labels.items()]
    assert len(matching) == 1
    return matching[0].value


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
async def test_the_families_of_vllm_04_have_their_names_types_labels_and_buckets(client: Client, path: str) -> None:
    families = await scrape(client, path)

    for name, (kind, bounds) in VLLM_04_FAMILIES.items():
        family = families[name]
        assert family.type == kind, name
        found = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
        assert set(bounds) <= found, name
        if name != "vllm:cache_config_info":
            assert {frozenset(sample.labels) - {"le"} for sample in family.samples} == {frozenset({"model_name"})}, name


async def test_the_cache_config_has_the_labels_of_the_seed(client: Client) -> None:
    (sample,) = (await scrape(client))["vllm:cache_config_info"].samples

    assert sample.value == 1
    assert set(sample.labels) == {
        *("block_size", "cache_dtype", "enable_prefix_caching", "forced_num_gpu_blocks", "gpu_memory_utilization"),
        *("num_cpu_blocks", "num_gpu_blocks", "sliding_window", "swap_space_bytes"),
    }


@pytest.mark.parametrize(("device", "share"), [("cuda:0 (a card)", "0.9"), ("cpu (a processor)", "None")])
async def test_the_cache_config_says_which_share_of_a_card_is_taken(client: Client, device: str, share: str) -> None:
    engine = client.engine
    engine.info = msgspec.structs.replace(engine.info, name="torch", device=device)

    (sample,) = (await scrape(client))["vllm:cache_config_info"].samples

    assert sample.labels["gpu_memory_utilization"] == share


async def test_failures_of_steps_and_between_steps_are_counted_apart(client: Client) -> None:
    client.engine.stats.engine_failures, client.engine.stats.step_failures = 2, 3

    families = await scrape(client)

    assert value(families["brlite:engine_failures"], "_total") == 2
    assert value(families["brlite:step_failures"], "_total") == 3


async def test_models_that_are_set_up_alike_share_one_line(client: Client) -> None:
    app = create_app(ModelTable(ServedModel(ModelSpec(name=name), client.engine) for name in ("one", "two")))

    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server, aiohttp.ClientSession(server.url) as session:
        text = await (await session.get("/metrics")).text()

    assert text.count("vllm:cache_config_info{") == 1
    assert text.count("brlite:backend_info{") == 2


@pytest.mark.parametrize("name", V1_FAMILIES)
async def test_the_names_of_the_v1_engine_are_there_too(client: Client, name: str) -> None:
    family = (await scrape(client))[name]

    assert all({"model_name", "engine"} <= set(sample.labels) for sample in family.samples)


async def test_a_request_moves_the_numbers(client: Client) -> None:
    await client.chat("hello", max_tokens=8)

    families = await scrape(client)

    assert value(families["vllm:prompt_tokens"], "_total") == 11
    assert value(families["vllm:generation_tokens"], "_total") == 8
    assert value(families["vllm:time_to_first_token_seconds"], "_count") == 1
    assert value(families["vllm:time_per_output_token_seconds"], "_count") == 7
    assert value(families["vllm:inter_token_latency_seconds"], "_count") == 7
    assert value(families["vllm:e2e_request_latency_seconds"], "_count") == 1
    assert value(families["vllm:request_success"], "_total", finished_reason="length") == 1
    assert value(families["vllm:num_requests_running"]) == 0
    assert value(families["vllm:prompt_tokens_by_source"], "_total", source="local_compute") == 11
    assert value(families["vllm:engine_sleep_state"], sleep_state="awake") == 1
    assert value(families["brlite:longest_wait_seconds"], priority="0") == 0


async def test_drafts_are_counted_under_the_names_of_the_v1_engine(
    make_client: Callable[..., Awaitable[Client]],
) -> None:
    client = await make_client(max_draft_tokens=7, next_token=lambda context, seed: ord("a"))
    await client.chat("hello", max_tokens=24)

    families = await scrape(client)

    num_drafts, num_draft_tokens, num_accepted = (
        value(families[f"vllm:spec_decode_num_{name}"], "_total")
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert 0 < num_drafts < num_accepted == num_draft_tokens
    by_position = families["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert value(by_position, "_total", position="0") == num_drafts
    assert sum(sample.value for sample in by_position.samples if sample.name.endswith("_total")) == num_accepted
    assert value(families["vllm:time_per_output_token_seconds"], "_count") == 23


async def test_a_draft_model_that_failed_is_counted_and_named_by_ready(
    make_client: Callable[..., Awaitable[Client]],
) -> None:
    def fault(seq: ScheduledSeq) -> str | None:
        raise RuntimeError("no memory")

    client = await make_client(max_draft_tokens=7, draft_backend=FakeBackend(fault=fault))
    await client.chat("hello", max_tokens=24)

    families = await scrape(client)
    status, answer = await client.get("/ready")

    assert value(families["brlite:draft_model_failures"], "_total") == 1
    assert status == 200
    assert answer["models"] == [{"model": MODEL, "status": "ready", "draft_model": "failed"}]


async def test_series_are_there_at_zero_while_the_model_loads() -> None:
    app = create_app(ModelTable([ServedModel(ModelSpec(name="slow"))]), Config())

    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server, aiohttp.ClientSession(server.url) as session:
        text = await (await session.get("/metrics")).text()

    assert 'vllm:num_requests_running{model_name="slow"} 0.0' in text
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="slow"} 0.0' in text
    assert 'vllm:engine_sleep_state{engine="0",model_name="slow",sleep_state="awake"} 0.0' in text


def test_the_average_rate_is_a_rate_over_the_last_interval() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    rate.add(100)
    now = 2 * RATE_SECONDS

    assert rate.value == 100 / now
    now *= 2
    assert rate.value == 0


async def test_the_tokens_of_steps_are_counted_as_by_vllm(client: Client) -> None:
    for number in range(10):
        await client.complete(f"{number}" * 9, max_tokens=10)

    families = await scrape(client)

    assert value(families["vllm:iteration_tokens_total"], "_sum") == 190
    assert value(families["vllm:request_max_num_generation_tokens"], "_sum") == 100
    assert value(families["vllm:gpu_prefix_cache_queries"], "_total") == 90


async def test_the_longest_completion_of_a_request_is_counted(client: Client) -> None:
    await client.complete("x", max_tokens=7, n=3)

    families = await scrape(client)

    assert value(families["vllm:request_max_num_generation_tokens"], "_sum") == 7
    assert value(families["vllm:request_generation_tokens"], "_sum") == 21

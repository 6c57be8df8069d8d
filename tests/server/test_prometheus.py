"""What Debian's Prometheus makes of `/metrics`, of a server and of a proxy."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from brlite.config.options import UpstreamConfig
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import run_proxy
from tests.server.conftest import Client

# As Prometheus 2.42, 2.53 and 3 send it, and a client that asks for OpenMetrics alone.
ACCEPTS = [
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;"
    "escaping=allow-utf-8;q=0.3,*/*;q=0.1",
    "application/openmetrics-text;version=1.0.0;escaping=underscores",
    "",
]
# The panels of vLLM's published dashboards, old and new.
QUERIES = [
    'histogram_quantile(0.99, sum by(le) (rate(vllm:e2e_request_latency_seconds_bucket{model_name="fake"}[1m])))',
    'rate(vllm:prompt_tokens_total{model_name="fake"}[1m])',
    'rate(vllm:generation_tokens_total{model_name="fake"}[1m])',
    "histogram_quantile(0.9, sum by(le) (rate(vllm:time_per_output_token_seconds_bucket[1m])))",
    'vllm:num_requests_running{model_name="fake"} + vllm:num_requests_waiting + vllm:num_requests_swapped',
    "histogram_quantile(0.9, sum by(le) (rate(vllm:time_to_first_token_seconds_bucket[1m])))",
    "vllm:gpu_cache_usage_perc + vllm:cpu_cache_usage_perc",
    "sum by(finished_reason) (increase(vllm:request_success_total[1m]))",
    "sum by(le) (increase(vllm:request_max_num_generation_tokens_bucket[1m]))",
    "vllm:gpu_prefix_cache_hits_total / (vllm:gpu_prefix_cache_queries_total > 0)",
    # "Instances" and "KV cache", as they are with all engines selected: the label's values in a regex.
    'sum by (instance, engine) (vllm:num_requests_running{job=~"(brlite)", model_name=~"(fake)", engine=~"(0)"})',
    'sum by (instance, engine) (rate(vllm:generation_tokens_total{model_name=~"(fake)", engine=~"(0)"}[1m]))',
    'histogram_quantile(0.95, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket{engine=~"(0)"}[1m])))',
    'sum by (reason) (vllm:num_requests_waiting_by_reason{engine=~"(0)", reason="capacity"})',
    'vllm:cache_config_info{engine=~"(0)"}',
    'sum(rate(process_cpu_seconds_total{job=~"(brlite)"}[1m])) + sum(process_open_fds) / sum(process_max_fds)',
    # "Overview" and "Service status".
    'sum(rate(vllm:prompt_tokens_by_source_total{source="local_compute"}[1m]))',
    '(2 - (max(vllm:engine_sleep_state{model_name=~"(fake)", sleep_state="awake"}) == bool 0)) == 2',
]
DASHBOARD = Path(__file__).parent.parent.parent / "deploy" / "grafana" / "brlite.json"
PAGE = (Path(__file__).parent.parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("accept", ACCEPTS, ids=["2.42", "3", "OpenMetrics", "none"])
async def test_the_text_is_prometheus_0_0_4_whatever_is_accepted(client: Client, accept: str) -> None:
    async with client.session.get(client.url + "/metrics", headers={"Accept": accept}) as response:
        text = await response.text()

    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "vllm:num_requests_running{" in text
    assert "vllm_" not in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed: it has promtool")
async def test_promtool_can_read_it(client: Client) -> None:
    await client.chat()
    async with client.session.get(client.url + "/metrics") as response:
        text = await response.read()

    check = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=PATIENCE_SECONDS
    )

    # It has opinions of names, which are vLLM's; what cannot be read it says in another way.
    complaints = [line for line in check.stderr.decode().splitlines() if not line.startswith("vllm:")]
    assert check.returncode in (0, 3), check.stderr
    assert [line for line in complaints if "should not contain ':'" not in line] == []


@asynccontextmanager
async def run_prometheus(folder: Path, *targets: str) -> AsyncIterator[str]:
    """Debian's Prometheus on a port of loopback, which scrapes the targets every second; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    listed = ", ".join(f'"{target}"' for target in targets)
    (relabeling,) = re.findall(r"^ +metric_relabel_configs:\n.*\n", PAGE, re.MULTILINE)
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        f"scrape_configs:\n  - job_name: brlite\n    static_configs: [{{targets: [{listed}]}}]\n{relabeling}"
    )
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stderr=asyncio.subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await ready(url)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def ready(url: str) -> None:
    """Return when it answers queries: it listens earlier, and says 503 until then."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_SECONDS):
        while True:
            with suppress(aiohttp.ClientError):
                async with session.get(f"{url}/-/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)


async def found(session: aiohttp.ClientSession, url: str, query: str) -> list[Any]:
    """What a query finds, once it finds something."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    while loop.time() < deadline:
        async with session.get(f"{url}/api/v1/query", params={"query": query}) as response:
            answer = await response.json(content_type=None)
        assert answer["status"] == "success", answer
        if answer["data"]["result"]:
            return list(answer["data"]["result"])
        await asyncio.sleep(0.2)
    raise AssertionError(f"{query} found nothing")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian's prometheus is not installed")
async def test_dashboards_find_what_they_ask_for(client: Client, tmp_path: Path) -> None:
    upstream = UpstreamConfig(url=client.url, models=("fake",), health_path="")
    async with run_proxy(upstream) as proxy:
        targets = (client.url.removeprefix("http://"), f"127.0.0.1:{proxy.port}")
        async with run_prometheus(tmp_path, *targets) as url:
            await found(client.session, url, 'up{job="brlite"} == 1')
            await client.chat()
            body = {"model": "fake", "prompt": "hello", "max_tokens": 2}
            async with client.session.post(f"http://127.0.0.1:{proxy.port}/v1/completions", json=body) as response:
                assert response.status == 200
            own = set(re.findall(r"(?:vllm|brlite):\w+", DASHBOARD.read_text())) - {"brlite:key_requests_total"}
            results = [await found(client.session, url, query) for query in [*QUERIES, *own]]
            names = await found(client.session, url, 'count({__name__=~"(vllm|brlite)_.*"}) or vector(0)')
            proxied = await found(client.session, url, 'count({__name__=~"brlite:.*"}) by (instance)')

    assert all(results)
    assert names[0]["value"][1] == "0"
    assert {row["metric"]["instance"] for row in proxied} == set(targets)

"""`/metrics` of a server that forwards: its own numbers and, on demand, its upstreams', each with its name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from brlite.app import FORWARDER, create_app, fast_paths
from brlite.config.options import Config, KeysConfig, ModelSpec, ProxyConfig, ServerConfig, UpstreamConfig
from brlite.http.listen import HttpServer
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.outcomes import Ending
from brlite.proxy.routing.route_table import RouteTable
from brlite.server.served_model import ModelTable, ServedModel
from tests.proxy.get_server import NEVER, Answer, GetServer

Families = dict[str, Metric]

THEIRS = b"""# HELP vllm:num_requests_running Theirs.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 7
# TYPE theirs_total counter
theirs_total 5
# TYPE process_open_fds histogram
process_open_fds_count 1
"""
MODEL = ModelSpec(name="here", load="on_demand")


class Front:
    def __init__(self, config: Config, url: str, forwarder: Forwarder, session: aiohttp.ClientSession) -> None:
        self.config, self.url, self.forwarder, self.session = config, url, forwarder, session

    async def text(self, query: str = "", **headers: str) -> str:
        async with self.session.get(f"{self.url}/metrics{query}", headers=headers) as response:
            assert response.status == 200, await response.text()
            return await response.text()

    async def families(self, query: str = "") -> Families:
        """What is scraped, after a look whether it is well-formed: each family is there once."""
        text = await self.text(query)
        names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
        assert len(set(names)) == len(names)
        return {family.name: family for family in text_string_to_metric_families(text)}

    async def refused(self, query: str) -> tuple[int, dict[str, Any]]:
        async with self.session.get(f"{self.url}/metrics{query}") as response:
            return response.status, (await response.json())["error"]

    async def ask(self, model: str = "m", **fields: object) -> int:
        body = json.dumps({"model": model, "prompt": "hello", **fields})
        headers = {"Content-Type": "application/json"}
        async with self.session.post(f"{self.url}/v1/completions", data=body, headers=headers) as response:
            await response.read()
            return response.status


Start = Callable[..., Awaitable[Front]]


def samples(families: Families, name: str, suffix: str = "") -> dict[tuple[str, ...], float]:
    """The values of a family by the values of its labels, in the order of the labels' names."""
    found = (sample for sample in families[name].samples if sample.name == name + suffix)
    return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in found}


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`await start(upstream, …, model=…)` starts a server in front of these upstreams, which never asks for health."""
    async with AsyncExitStack() as stack:

        async def make(*upstreams: UpstreamConfig, model: tuple[ModelSpec, ...] = (MODEL,), **options: Any) -> Front:
            config = Config(
                model=model, upstream=upstreams, **{"proxy": ProxyConfig(health_timeout_seconds=5), **options}
            )
            app = create_app(ModelTable([ServedModel(spec) for spec in model]), config)
            server = HttpServer(app, "127.0.0.1", 0, config.limits, 0.2, fast_paths(app))
            await stack.enter_async_context(server)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Front(config, server.url, app[FORWARDER], session)

        yield make


def upstream(server: GetServer | str, name: str, *models: str, **options: Any) -> UpstreamConfig:
    url = server if isinstance(server, str) else server.url
    return UpstreamConfig(url=url, name=name, models=models or ("m",), health_path="", **options)


@pytest.fixture
async def answering() -> AsyncIterator[str]:
    """The address of an upstream that answers every request: 400 if it has a `bad` field, else 200."""

    async def answer(request: web.BaseRequest) -> web.Response:
        body = await request.json()
        return web.json_response({"usage": {}}, status=400 if "bad" in body else 200)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_requests_are_counted_by_model_and_by_upstream(start: Start, answering: str) -> None:
    downstream = await start(upstream(answering, "one"), upstream("http://127.0.0.1:1", "dead", "other"))
    statuses = [
        await downstream.ask(),
        await downstream.ask(),
        await downstream.ask(bad=True),
        await downstream.ask("other"),
    ]

    families = await downstream.families()

    assert statuses == [200, 200, 400, 503]
    answers = samples(families, "brlite:proxy_requests", "_total")
    assert answers == {("m", "200"): 2, ("m", "400"): 1, ("other", "503"): 1}
    assert samples(families, "brlite:proxy_request_seconds", "_count") == {("m",): 3, ("other",): 1}
    assert samples(families, "brlite:proxy_first_byte_seconds", "_count") == {("m",): 3, ("other",): 0}
    outcomes = samples(families, "brlite:upstream_requests", "_total")
    assert {pair: count for pair, count in outcomes.items() if count} == {("answered", "one"): 3, ("failed", "dead"): 1}
    assert samples(families, "brlite:upstream_connections")["one",] >= 1
    assert samples(families, "brlite:upstream_in_flight") == {("one",): 0, ("dead",): 0}


async def test_one_scrape_shows_both_rooms_and_the_process_once(start: Start, answering: str) -> None:
    downstream = await start(upstream(answering, "one"))

    families = await downstream.families()

    assert {"vllm:num_requests_running", "brlite:proxy_requests", "process_resident_memory_bytes"} <= families.keys()
    assert samples(families, "brlite:proxy_in_flight") == {("m",): 0}


async def test_a_server_without_upstreams_has_none_of_these_families(start: Start) -> None:
    downstream = await start()

    assert not [name for name in await downstream.families() if "proxy" in name or "upstream" in name]


async def test_an_upstream_is_up_while_it_is_healthy_and_not_ejected(start: Start) -> None:
    config = ProxyConfig(eject_failures=1)
    downstream = await start(*(upstream(f"http://127.0.0.1:{port}", f"at-{port}") for port in (1, 2, 3)), proxy=config)
    _, ejected, ill = downstream.forwarder.table.upstreams
    ill.is_healthy = False
    now = downstream.forwarder.loop.time()
    ejected.end(ejected.begin(now), Ending.BROKEN, now)

    families = await downstream.families()

    assert samples(families, "brlite:upstream_up") == {("at-1",): 1, ("at-2",): 0, ("at-3",): 0}
    states = samples(families, "brlite:upstream_breaker_state")
    assert {pair for pair, value in states.items() if value} == {
        ("closed", "at-1"),
        ("open", "at-2"),
        ("closed", "at-3"),
    }


@pytest.mark.parametrize("weight", [1, 5], ids=["as it was", "changed"])
async def test_counters_never_go_back_when_the_config_changes(start: Start, answering: str, weight: int) -> None:
    downstream = await start(upstream(answering, "one"))
    await downstream.ask()
    changed = Config(model=(MODEL,), upstream=(upstream(answering, "one", weight=weight), upstream("http://b", "two")))

    downstream.forwarder.replace(changed, RouteTable(changed, downstream.forwarder.table))
    await downstream.ask()
    families = await downstream.families()

    assert samples(families, "brlite:upstream_requests", "_total")["answered", "one"] == 2
    assert samples(families, "brlite:proxy_requests", "_total") == {("m", "200"): 2}
    assert samples(families, "brlite:upstream_up").keys() == {("one",), ("two",)}


async def test_names_come_from_the_config_alone(start: Start, answering: str) -> None:
    downstream = await start(upstream(answering, "one"), proxy=ProxyConfig(aliases={"alias": "m"}))

    statuses = [await downstream.ask("alias"), *[await downstream.ask(f"unknown-{number}") for number in range(5)]]

    assert statuses == [200, 404, 404, 404, 404, 404]
    assert samples(await downstream.families(), "brlite:proxy_requests", "_total") == {("m", "200"): 1}


async def test_on_demand_the_upstreams_numbers_stand_beside_ours(start: Start) -> None:
    async with GetServer({"/metrics": Answer(body=THEIRS)}) as one, GetServer({"/metrics": Answer(body=THEIRS)}) as two:
        downstream = await start(upstream(one, "one", api_key="own"), upstream(two, "two"))

        families = await downstream.families("?upstream=all")

    running = samples(families, "vllm:num_requests_running")
    assert running == {("here",): 0, ("m", "one"): 7, ("m", "two"): 7}
    assert samples(families, "theirs", "_total") == {("one",): 5, ("two",): 5}
    assert samples(families, "brlite:upstream_scrape_ok") == {("one",): 1, ("two",): 1}
    assert one.asked[0].headers["Authorization"] == "Bearer own"
    assert "Authorization" not in two.asked[0].headers


async def test_one_upstream_may_be_asked_by_its_name(start: Start) -> None:
    async with GetServer({"/metrics": Answer(body=THEIRS)}) as one, GetServer() as two:
        downstream = await start(upstream(one, "one"), upstream(two, "two"))

        families = await downstream.families("?upstream=one")

    assert samples(families, "theirs", "_total") == {("one",): 5}
    assert two.asked == []


async def test_a_family_of_another_type_is_left_out_and_said(start: Start) -> None:
    async with GetServer({"/metrics": Answer(body=THEIRS)}) as one:
        downstream = await start(upstream(one, "one"))

        text = await downstream.text("?upstream=all")

    assert "# upstream one: process_open_fds was left out: its type differs from the others'\n" in text
    assert "process_open_fds_count" not in text


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer(404), "answered 404 to GET /metrics"),
        (Answer(body=b"<html>\n"), "line 1 is not a sample: <html>"),
        (Answer(body=b"up 1\n\xff"), "can't decode byte 0xff"),
        (Answer(body=b"# \n" * 2**21), "answered more than 4194304 bytes"),
        (NEVER, "did not answer GET /metrics within 3 s"),
    ],
    ids=["absent", "no metrics", "not UTF-8", "too long", "silent"],
)
async def test_an_upstream_that_cannot_be_read_is_said_and_harms_no_other(
    start: Start, answer: Answer, why: str
) -> None:
    async with GetServer({"/metrics": answer}) as bad, GetServer({"/metrics": Answer(body=THEIRS)}) as good:
        config = ProxyConfig(health_timeout_seconds=3)  # the good one answers in time on a busy machine, too
        downstream = await start(upstream(bad, "bad"), upstream(good, "good"), proxy=config)

        families, text = await downstream.families("?upstream=all"), await downstream.text("?upstream=bad")

    assert samples(families, "brlite:upstream_scrape_ok") == {("bad",): 0, ("good",): 1}
    assert samples(families, "theirs", "_total") == {("good",): 5}
    (said,) = (line for line in text.splitlines() if line.startswith("# upstream bad: "))
    assert why in said


async def test_the_text_format_is_answered_whatever_was_asked_for(start: Start) -> None:
    async with GetServer({"/metrics": Answer(body=THEIRS)}) as one:
        downstream = await start(upstream(one, "one"))

        text = await downstream.text("?upstream=all", Accept="application/openmetrics-text; version=1.0.0")

    assert "# EOF" not in text


@pytest.mark.parametrize("name", ["nobody", "", "127.0.0.1:1"])
async def test_a_name_that_no_upstream_has_is_refused_with_those_that_have_one(start: Start, name: str) -> None:
    async with GetServer() as one:
        downstream = await start(upstream(one, "one"))

        status, error = await downstream.refused(f"?upstream={name}")

    assert status == 400
    assert error["message"] == f"No upstream is called `{name}`; allowed: all, one"
    assert error["param"] == "upstream"


async def test_where_there_is_no_upstream_none_can_be_asked(start: Start) -> None:
    status, error = await (await start()).refused("?upstream=all")

    assert (status, error["message"]) == (400, "This server has no upstreams.")


async def test_many_who_ask_at_once_are_one_to_the_upstream(
    start: Start, eventually: Callable[[Callable[[], bool]], Awaitable[None]]
) -> None:
    async with GetServer({"/metrics": NEVER}) as one:
        downstream = await start(upstream(one, "one"))
        many = [asyncio.create_task(downstream.families("?upstream=all")) for _ in range(20)]
        await eventually(lambda: bool(one.asked))
        many[0].cancel()  # which must not take the others' answer

        await one.kill()
        found = await asyncio.gather(*many[1:])

    assert [samples(families, "brlite:upstream_scrape_ok") for families in found] == [{("one",): 0}] * 19
    assert len(one.asked) == 1


async def test_upstreams_are_asked_for_a_key_s_owner_only_where_metrics_need_one(start: Start) -> None:
    async with GetServer({"/metrics": Answer(body=THEIRS)}) as one:
        downstream = await start(
            upstream(one, "one"), keys=KeysConfig(keys=("secret",)), server=ServerConfig(metrics_need_key=True)
        )

        status, _ = await downstream.refused("?upstream=all")
        text = await downstream.text("?upstream=all", Authorization="Bearer secret")

    assert status == 401
    assert len(one.asked) == 1
    assert 'theirs_total{upstream="one"} 5' in text

"""The table of upstreams, made anew when the config changes: what is under way goes on counting."""

from __future__ import annotations

import time

import msgspec

from brlite.config.options import Config, ProxyConfig, UpstreamConfig
from brlite.proxy.routing.route_table import RouteTable

CONFIG = Config(model=(), upstream=(UpstreamConfig(url="http://a", models=("m",)),), proxy=ProxyConfig(max_in_flight=1))


def with_proxy(**fields: object) -> Config:
    return msgspec.structs.replace(CONFIG, proxy=msgspec.structs.replace(CONFIG.proxy, **fields))


def test_places_that_are_taken_stay_taken_over_a_change_of_the_config() -> None:
    before = RouteTable(CONFIG)
    assert before.routes["m"].limit.acquire("key")

    after = RouteTable(with_proxy(idle_seconds=1.0), before)

    assert not after.routes["m"].limit.acquire("key")


def test_another_number_of_places_holds_at_once() -> None:
    before = RouteTable(CONFIG)
    assert before.routes["m"].limit.acquire("key")

    after = RouteTable(with_proxy(max_in_flight=2), before)

    assert [after.routes["m"].limit.acquire("key") for _ in range(3)] == [True, True, False]


def test_a_table_is_made_in_time_linear_in_its_models_and_upstreams() -> None:
    many = UpstreamConfig(url="http://many", models=tuple(f"m{number}" for number in range(40_000)))
    ones = [UpstreamConfig(url=f"http://h{number}", models=(f"m{number}",)) for number in range(2_000)]
    config = msgspec.structs.replace(CONFIG, upstream=(many, *ones))
    began = time.process_time()

    table = RouteTable(config)
    after = RouteTable(config, table)

    assert time.process_time() < began + 15  # each model with all before it took 60 s
    assert after.upstreams == table.upstreams
    assert [upstream.name for upstream in after.routes["m7"].upstreams] == ["http://many", "http://h7"]
    assert len(after.routes) == 40_000


def test_an_upstream_that_names_a_model_twice_serves_it_once() -> None:
    config = msgspec.structs.replace(CONFIG, upstream=(UpstreamConfig(url="http://a", models=("m", "m")),))

    assert len(RouteTable(config).routes["m"].upstreams) == 1

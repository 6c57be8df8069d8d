"""The table of upstreams, made anew when the config changes: what is under way goes on counting."""

from __future__ import annotations

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

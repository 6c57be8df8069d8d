"""Which upstream a request goes to: by load, in turn, or by what its prompt or session has in common with others."""

from __future__ import annotations

import math
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.config.options import Choice
from brlite.proxy.routing.balancer import Balancer, Candidate

NOW = 5.0
CHOICES = get_args(Choice)


class Server:
    """An upstream as the chooser sees it."""

    is_healthy = True
    failed_at = -math.inf

    def __init__(self, name: str, *, weight: int = 1, num_in_flight: int = 0, is_up: bool = True) -> None:
        self.name = name
        self.weight = weight
        self.num_in_flight = num_in_flight
        self.is_up = is_up

    def __repr__(self) -> str:
        return self.name

    def is_available(self, now: float) -> bool:
        assert now == NOW
        return self.is_up


def names(chooser: Balancer[Server], num_choices: int, affinity: bytes | None = None) -> str:
    """The names of those chosen, in their order, while each is idle again before the next choice."""
    chosen = [chooser.choose(NOW, affinity) for _ in range(num_choices)]
    return "".join(str(server) for server in chosen)


def homes(servers: list[Server], num_affinities: int = 2000) -> list[str]:
    """The name of the server that each of many sessions sticks to."""
    chooser = Balancer("sticky", servers)
    return [str(chooser.choose(NOW, b"session %d" % number)) for number in range(num_affinities)]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_only_upstream_is_chosen_even_when_it_is_down(choice: Choice) -> None:
    server: Candidate = Server("a", is_up=False)

    assert Balancer(choice, [server]).choose(NOW, b"affinity") is server


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("affinity", [None, b"", b"affinity"])
def test_a_request_tries_each_upstream_once_those_that_are_up_first(choice: Choice, affinity: bytes | None) -> None:
    servers = [Server("a", is_up=False), Server("b"), Server("c", is_up=False), Server("d", num_in_flight=9)]
    chooser = Balancer(choice, servers)

    tried: list[Server] = []
    while (server := chooser.choose(NOW, affinity, tried)) is not None:
        tried.append(server)

    assert {str(server) for server in tried[:2]} == {"b", "d"}
    assert {str(server) for server in tried[2:]} == {"a", "c"}
    assert len(tried) == 4


@pytest.mark.parametrize("choice", CHOICES)
def test_an_upstream_that_was_tried_is_not_tried_again(choice: Choice) -> None:
    server = Server("a")

    assert Balancer(choice, [server]).choose(NOW, None, {server}) is None


@pytest.mark.parametrize("choice", CHOICES)
def test_where_none_is_available_who_failed_last_is_avoided_and_the_others_take_turns(choice: Choice) -> None:
    servers = [Server(name, is_up=False) for name in "abc"]
    servers[0].failed_at = NOW - 1
    servers[1].failed_at = NOW - 2
    chooser = Balancer(choice, servers)

    before = [str(chooser.choose(NOW, b"affinity")) for _ in range(4)]
    servers[2].failed_at = NOW
    after = [str(chooser.choose(NOW, b"affinity")) for _ in range(4)]

    assert (sorted(before), sorted(after)) == (list("bbcc"), list("aabb"))


@pytest.mark.parametrize("choice", CHOICES)
def test_where_none_is_available_those_that_pass_their_checks_come_first(choice: Choice) -> None:
    servers = [Server(name, is_up=False) for name in "ab"]
    servers[0].is_healthy = False
    servers[1].failed_at = NOW

    assert str(Balancer(choice, servers).choose(NOW, b"affinity")) == "b"


def test_without_upstreams_none_is_chosen() -> None:
    chooser: Balancer[Server] = Balancer("least_loaded", [])

    assert chooser.choose(NOW) is None


def test_the_least_loaded_for_its_weight_is_chosen() -> None:
    servers = [Server("a", num_in_flight=2), Server("b", weight=4, num_in_flight=7), Server("c", num_in_flight=3)]

    assert str(Balancer("least_loaded", servers).choose(NOW)) == "b"


def test_equally_loaded_ones_take_turns() -> None:
    servers = [Server("a"), Server("b", num_in_flight=1), Server("c"), Server("d")]

    assert names(Balancer("least_loaded", servers), 6) == "acdacd"


def test_round_robin_spreads_turns_by_weight_and_evenly() -> None:
    servers = [Server("a", weight=4), Server("b", weight=2), Server("c")]

    turns = names(Balancer("round_robin", servers), 14)

    assert Counter(turns[:7]) == {"a": 4, "b": 2, "c": 1}
    assert turns[:7] == turns[7:]
    assert "aaa" not in turns


def test_round_robin_passes_over_what_is_down() -> None:
    servers = [Server("a"), Server("b", is_up=False), Server("c")]

    assert names(Balancer("round_robin", servers), 4) == "acac"


@pytest.mark.parametrize("choice", ["prefix", "sticky"])
def test_the_same_affinity_leads_to_the_same_upstream_for_ever(choice: Choice) -> None:
    chooser = Balancer(choice, [Server(name) for name in "abcd"])

    chosen = [names(chooser, 2, affinity) for affinity in (b"one", b"two", b"three", b"four", b"five")]

    # Other draws than these would move every session when brlite is updated.
    assert chosen == ["aa", "bb", "aa", "dd", "cc"]


def test_without_affinity_the_least_loaded_is_chosen() -> None:
    servers = [Server("a", num_in_flight=1), Server("b"), Server("c", num_in_flight=1)]

    chosen = [
        names(Balancer(choice, servers), 3, affinity) for choice in ("prefix", "sticky") for affinity in (None, b"")
    ]

    assert chosen == ["bbb"] * 4


def test_sessions_are_spread_by_weight() -> None:
    counts = Counter(homes([Server("a"), Server("b", weight=2), Server("c", weight=5)]))

    assert counts["a"] == pytest.approx(250, rel=0.2)
    assert counts["b"] == pytest.approx(500, rel=0.2)
    assert counts["c"] == pytest.approx(1250, rel=0.2)


@pytest.mark.parametrize("absent", ["removed", "down"])
def test_only_the_sessions_of_what_goes_away_move(absent: str) -> None:
    before = homes([Server(name, weight=weight) for name, weight in (("a", 1), ("b", 3), ("c", 2))])

    left = [Server("c", weight=2), Server("a", weight=1)]  # in another order, too
    after = homes(left if absent == "removed" else [*left, Server("b", weight=3, is_up=False)])

    assert {(old, new) for old, new in zip(before, after, strict=True) if old != new} == {("b", "a"), ("b", "c")}


def test_a_sticky_session_stays_whatever_the_load() -> None:
    servers = [Server(name) for name in "abc"]
    chooser = Balancer("sticky", servers)
    home = chooser.choose(NOW, b"session")
    assert home is not None

    home.num_in_flight = 1000

    assert chooser.choose(NOW, b"session") is home


def test_a_prefix_stays_until_its_upstream_is_well_above_the_mean() -> None:
    servers = [Server(name, num_in_flight=7) for name in "abc"]
    chooser = Balancer("prefix", servers)
    home = chooser.choose(NOW, b"prefix")
    assert home is not None

    loads = []
    for load in range(8, 20):  # the mean is (14 + load) / 3
        home.num_in_flight = load
        if chooser.choose(NOW, b"prefix") is home:
            loads.append(load)

    assert loads == list(range(8, 12))


def test_a_prefix_that_spills_goes_to_the_next_in_hash_order() -> None:
    servers = [Server(name) for name in "abcdef"]
    chooser = Balancer("prefix", servers)
    first = chooser.choose(NOW, b"prefix")
    assert first is not None
    second = chooser.choose(NOW, b"prefix", [first])

    first.num_in_flight = 10

    assert [chooser.choose(NOW, b"prefix") for _ in range(5)] == [second] * 5


servers_of_any_load = st.lists(
    st.builds(
        Server,
        st.text(max_size=3),
        weight=st.integers(1, 1000),
        num_in_flight=st.integers(0, 1000),
        is_up=st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@given(servers=servers_of_any_load, choice=st.sampled_from(CHOICES), affinity=st.none() | st.binary(max_size=4))
def test_all_are_tried_whatever_their_loads_and_what_is_up_goes_first(
    servers: list[Server], choice: Choice, affinity: bytes | None
) -> None:
    chooser = Balancer(choice, servers)

    tried: list[Server] = []
    while (server := chooser.choose(NOW, affinity, tried)) is not None:
        tried.append(server)

    assert sorted(map(id, tried)) == sorted(map(id, servers))
    assert len(servers) == 1 or [server.is_up for server in tried] == sorted((s.is_up for s in servers), reverse=True)

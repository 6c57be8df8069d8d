"""The forwarder's numbers as Prometheus metrics. Only this file of the room imports prometheus_client.

Label values are names from the config and statuses, never text from clients. The upstreams' own metrics are read by
`exposition.py` and `scrape.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from brlite.proxy.forwarder import Forwarder
from brlite.proxy.routing.breaker import State
from brlite.proxy.routing.route_table import Route
from brlite.proxy.routing.upstream import Upstream

S = TypeVar("S")
# Families: of each the name, the help text, and a function that reads its value.
Rows = list[tuple[str, str, Callable[[S], float]]]

MODEL_GAUGES: Rows[Route] = [
    ("brlite:proxy_in_flight", "Requests that an upstream works on.", lambda t: t.limit.num_in_flight),
    ("brlite:proxy_queued", "Requests that wait in the queue.", lambda t: t.limit.num_waiting),
]
UPSTREAM_COUNTERS: Rows[Upstream] = [
    ("brlite:upstream_retries", "Attempts that were followed by another.", lambda u: u.counts.num_retries),
    ("brlite:upstream_events", "Events of relayed streams.", lambda u: u.counts.num_events),
]
UPSTREAM_GAUGES: Rows[Upstream] = [
    ("brlite:upstream_in_flight", "Requests that it works on.", lambda u: u.num_in_flight),
    ("brlite:upstream_connections", "Open connections to it, idle ones too.", lambda u: len(u.pool.connections)),
]


class ForwardingCollector(Collector):
    """Renders a forwarder's state at each scrape; nothing if it never had an upstream."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    def collect(self) -> Iterable[Metric]:
        if not self._forwarder.table.upstreams and not self._forwarder.answers:
            return
        about = "Finished requests by status; 499: the client disconnected."
        answers = CounterMetricFamily("brlite:proxy_requests", about, labels=["model", "status"])
        for (model, status), count in self._forwarder.answers.items():
            answers.add_metric([model, str(status)], count)
        yield answers
        yield from self._times()
        models = [(route.model, route) for route in self._forwarder.table]
        upstreams = [(upstream.name, upstream) for upstream in self._forwarder.table.upstreams]
        yield from _families(GaugeMetricFamily, MODEL_GAUGES, "model", models)
        about = "Attempts to have a request answered, by outcome."
        outcomes = CounterMetricFamily("brlite:upstream_requests", about, labels=["upstream", "outcome"])
        for name, upstream in upstreams:
            for outcome, count in upstream.counts.outcomes.items():
                outcomes.add_metric([name, outcome], count)
        yield outcomes
        yield from _families(CounterMetricFamily, UPSTREAM_COUNTERS, "upstream", upstreams)
        yield from _families(GaugeMetricFamily, UPSTREAM_GAUGES, "upstream", upstreams)
        now = self._forwarder.loop.time()
        is_up: Rows[Upstream] = [
            ("brlite:upstream_up", "1 if it is healthy and not ejected, else 0.", lambda u: u.is_up(now))
        ]
        yield from _families(GaugeMetricFamily, is_up, "upstream", upstreams)
        about = "1 for the state of its circuit breaker, 0 for the others; an open one gets no requests."
        breakers = GaugeMetricFamily("brlite:upstream_breaker_state", about, labels=["upstream", "state"])
        for name, upstream in upstreams:
            for state in get_args(State):
                breakers.add_metric([name, state], upstream.breaker.state(now) == state)
        yield breakers
        owners = self._forwarder.owners.store
        about = "Ids of stored responses whose upstream is known."
        yield GaugeMetricFamily("brlite:proxy_response_ids", about, value=len(owners))
        yield GaugeMetricFamily("brlite:proxy_response_id_bytes", "Bytes that they take.", value=owners.num_bytes)
        about = "Ids that were forgotten because limits.max_owner_bytes was reached."
        yield CounterMetricFamily("brlite:proxy_response_ids_forgotten", about, value=owners.num_forgotten)

    def _times(self) -> Iterable[Metric]:
        forwarder = self._forwarder
        num_answers: Counter[str] = Counter()
        for (model, _), count in forwarder.answers.items():
            num_answers[model] += count
        yield self._summary("brlite:proxy_request_seconds", "Arrival to end.", num_answers, forwarder.seconds)
        name, about = "brlite:proxy_first_byte_seconds", "Arrival to the first byte from an upstream."
        yield self._summary(name, about, forwarder.num_first_bytes, forwarder.first_byte_seconds)

    def _summary(self, name: str, about: str, counts: Mapping[str, int], sums: Mapping[str, float]) -> Metric:
        family = SummaryMetricFamily(name, about, labels=["model"])
        for model in dict.fromkeys([*(route.model for route in self._forwarder.table), *counts]):
            family.add_metric([model], count_value=counts.get(model, 0), sum_value=sums.get(model, 0.0))
        return family


def _families(
    kind: type[GaugeMetricFamily | CounterMetricFamily], rows: Rows[S], label: str, subjects: list[tuple[str, S]]
) -> Iterable[Metric]:
    """A family for each row. It has a sample for each of `subjects`: its value of the label, and what is read."""
    for name, about, value in rows:
        family = kind(name, about, labels=[label])
        for shown, subject in subjects:
            family.add_metric([shown], value(subject))
        yield family

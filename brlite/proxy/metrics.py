"""The forwarder's numbers as Prometheus metrics. Only this file of the room imports prometheus_client.

Label values are names from the config and statuses, never text from clients. The upstreams' own metrics are read by
`exposition.py` and `scrape.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from brlite.proxy.forwarder import Forwarder
from brlite.proxy.routing.breaker import State
from brlite.proxy.routing.route_table import Route
from brlite.proxy.routing.upstream import Upstream


class UpstreamRow(NamedTuple):
    """One metric of upstreams: its name, its help text, and its value."""

    name: str
    about: str
    value: Callable[[Upstream], float]


class ModelRow(NamedTuple):
    """One metric of models."""

    name: str
    about: str
    value: Callable[[Route], float]


MODEL_GAUGES = [
    ModelRow("brlite:proxy_in_flight", "Requests that an upstream works on.", lambda t: t.limit.num_in_flight),
    ModelRow("brlite:proxy_queued", "Requests that wait in the queue.", lambda t: t.limit.num_waiting),
]
UPSTREAM_COUNTERS = [
    UpstreamRow("brlite:upstream_retries", "Attempts that were followed by another.", lambda u: u.num_retries),
    UpstreamRow("brlite:upstream_events", "Events of relayed streams.", lambda u: u.num_events),
]
UPSTREAM_GAUGES = [
    UpstreamRow("brlite:upstream_in_flight", "Requests that it works on.", lambda u: u.num_in_flight),
    UpstreamRow(
        "brlite:upstream_connections", "Open connections to it, idle ones too.", lambda u: len(u.pool.connections)
    ),
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
        for row in MODEL_GAUGES:
            family = GaugeMetricFamily(row.name, row.about, labels=["model"])
            for target in self._forwarder.table:
                family.add_metric([target.model], row.value(target))
            yield family
        about = "Attempts to have a request answered, by outcome."
        outcomes = CounterMetricFamily("brlite:upstream_requests", about, labels=["upstream", "outcome"])
        for upstream in self._forwarder.table.upstreams:
            for outcome, count in upstream.outcomes.items():
                outcomes.add_metric([upstream.name, outcome], count)
        yield outcomes
        yield from self._upstreams(CounterMetricFamily, UPSTREAM_COUNTERS)
        yield from self._upstreams(GaugeMetricFamily, UPSTREAM_GAUGES)
        now = self._forwarder.loop.time()
        up = UpstreamRow("brlite:upstream_up", "1 if it is healthy and not ejected, else 0.", lambda u: u.is_up(now))
        yield from self._upstreams(GaugeMetricFamily, [up])
        about = "1 for the state of its circuit breaker, 0 for the others; an open one gets no requests."
        breakers = GaugeMetricFamily("brlite:upstream_breaker_state", about, labels=["upstream", "state"])
        for upstream in self._forwarder.table.upstreams:
            for state in get_args(State):
                breakers.add_metric([upstream.name, state], upstream.breaker.state(now) == state)
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
        for model in dict.fromkeys([*(target.model for target in self._forwarder.table), *counts]):
            family.add_metric([model], count_value=counts.get(model, 0), sum_value=sums.get(model, 0.0))
        return family

    def _upstreams(
        self, kind: type[GaugeMetricFamily | CounterMetricFamily], rows: list[UpstreamRow]
    ) -> Iterable[Metric]:
        for row in rows:
            family = kind(row.name, row.about, labels=["upstream"])
            for upstream in self._forwarder.table.upstreams:
                family.add_metric([upstream.name], row.value(upstream))
            yield family

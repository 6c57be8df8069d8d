"""One upstream: its address, its models and its state. Sends nothing."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import get_args

import msgspec

from brlite.config.address import parse_address
from brlite.config.options import ProxyConfig, UpstreamConfig
from brlite.errors import ConfigError
from brlite.process.children import read_secret
from brlite.proxy.outcomes import ANSWERED, OUTCOMES, Ending, Outcome, Owner
from brlite.proxy.routing.breaker import Breaker, Ticket
from brlite.proxy.routing.listing import ListedModel
from brlite.proxy.wire.connections import ConnectionPool
from brlite.proxy.wire.heads import FORWARDED_PATHS, Heads, read_answer

# Characters that are allowed in a header: a line end would begin another header.
_KEY = re.compile(r"[!-~]+")


class UpstreamCounts(msgspec.Struct):
    """Counters for the metrics. One that replaces another of its name has the other's, whose last streams still count.

    So counters never go back, and lose nothing.
    """

    outcomes: Counter[Outcome]
    num_events: int = 0
    num_retries: int = 0


class Upstream:
    """A server behind this one. `num_in_flight` counts its requests; `is_healthy` is the result of its checks.

    `listed` has the models of its own list by its own names; empty until the list was read. `missing` maps the models
    that it reported as missing to the loop's time until which they count as missing.
    """

    __slots__ = (
        "_limits",
        "breaker",
        "config",
        "counts",
        "failed_at",
        "heads",
        "is_healthy",
        "known_head_lines",
        "listed",
        "lost_since",
        "missing",
        "name",
        "num_in_flight",
        "own_headers",
        "pool",
        "refuses_until",
        "weight",
    )

    def __init__(self, config: UpstreamConfig, proxy: ProxyConfig, environ: Mapping[str, str] = os.environ) -> None:
        address = parse_address(config.url)
        assert address is not None  # the config was checked
        self.config = config
        self._limits = _limits(proxy)
        self.name = config.name or config.url
        self.weight = config.weight
        own_headers = f"Host: {address.host_header}\r\n"
        if (key := _key(config, environ)) is not None:
            scheme = "Bearer " if config.api_key_header.lower() == "authorization" else ""
            own_headers += f"{config.api_key_header}: {scheme}{key}\r\n"
        self.own_headers = own_headers.encode("latin-1")  # the header lines that every request to it has
        self.breaker = Breaker(proxy.eject_failures, proxy.eject_seconds)
        self.pool = ConnectionPool(
            address,
            ca_file=config.ca_file,
            max_idle=proxy.max_idle_connections,
            idle_seconds=proxy.idle_connection_seconds,
        )
        self.known_head_lines = {path: self.head_lines(path) for path in FORWARDED_PATHS}  # without a query
        self.heads = Heads(read_answer)
        self.is_healthy = True
        self.lost_since: float | None = None  # the loop's time since which it is out, except by an orderly shutdown
        self.listed: Mapping[str, ListedModel] = {}
        self.missing: dict[str, float] = {}
        self.num_in_flight = 0
        self.failed_at = -math.inf  # the loop's time of its last failure
        self.refuses_until = 0.0  # the loop's time at which its Retry-After ends
        self.counts = UpstreamCounts(Counter(dict.fromkeys(get_args(Outcome), 0)))

    def __repr__(self) -> str:
        return f"Upstream({self.name})"

    def is_made_from(self, config: UpstreamConfig, proxy: ProxyConfig) -> bool:
        """Whether these configs make the same upstream."""
        return self.config == config and self._limits == _limits(proxy)

    def continue_counts(self, before: Upstream) -> None:
        """Share the counters of the upstream that had this name before."""
        self.counts = before.counts

    def is_up(self, now: float) -> bool:
        """Whether its checks pass and its breaker is not open."""
        return self.is_healthy and self.breaker.state(now) != "open"

    def is_available(self, now: float) -> bool:
        """Whether it may get requests: its checks pass, it is not ejected, and no Retry-After runs."""
        return self.is_healthy and self.refuses_until <= now and self.breaker.allows(now)

    def head_lines(self, path: bytes, method: bytes = b"POST") -> bytes:
        """The request line, and the upstream's own header lines, for a client's request to `path`."""
        target = self.pool.address.path(path.decode("latin-1")).encode("latin-1")
        return b"%b %b HTTP/1.1\r\n%b" % (method, target, self.own_headers)

    def lacks(self, model: str, now: float) -> bool:
        """Whether it counts as lacking the model. `model` is the upstream's own name for it."""
        return bool(self.missing) and self.missing.get(model, 0.0) > now

    def begin(self, now: float) -> Ticket:
        """Register a request. `end` must follow, with the returned ticket."""
        self.num_in_flight += 1
        breaker = self.breaker
        return breaker.ticket if breaker.is_untroubled else breaker.begin(now)

    def end(self, ticket: Ticket, ending: Ending, now: float) -> None:
        """Register the end of a request."""
        self.num_in_flight -= 1
        if ending is ANSWERED and self.breaker.is_untroubled:
            self.counts.outcomes["answered"] += 1
            return
        row = OUTCOMES[ending]
        self.counts.outcomes[row.outcome] += 1
        if row.owner is None:
            self.breaker.succeeded(ticket)
        elif row.owner is Owner.UPSTREAM:
            self.failed_at = now
            self.breaker.failed(ticket, now)
        else:
            self.breaker.abandoned(ticket)


def _limits(proxy: ProxyConfig) -> tuple[float, ...]:
    """The values of the proxy's config that an upstream uses."""
    return (proxy.eject_failures, proxy.eject_seconds, proxy.max_idle_connections, proxy.idle_connection_seconds)


def _key(config: UpstreamConfig, environ: Mapping[str, str]) -> str | None:
    if config.api_key is None and config.api_key_env is None:
        return None
    where = "api_key" if config.api_key_env is None else f"the variable {config.api_key_env}"
    key = config.api_key if config.api_key_env is None else read_secret(config.api_key_env, environ)
    if not key:
        raise ConfigError(f"upstream {config.name or config.url}: {where} is empty")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"upstream {config.name or config.url}: {where}: allowed is one word of ASCII characters")
    return key

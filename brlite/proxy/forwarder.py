"""What all exchanges share: the route table, one timer for all deadlines, and the counts for the metrics."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, defaultdict

from brlite.config.options import Config, ProxyConfig
from brlite.errors import InvalidRequest, LoopDetected, RequestError, stopping
from brlite.http.api_key import ApiKey
from brlite.http.errors import CLIENT_LEFT
from brlite.proxy.attempt import Downstream
from brlite.proxy.background_usage import BackgroundUsage
from brlite.proxy.exchange import Exchange, ForwardedRequest
from brlite.proxy.prompt_start import prompt_start
from brlite.proxy.request_model import Inbound
from brlite.proxy.response_owners import RESPONSES_PATH, ResponseOwners, stored_response
from brlite.proxy.routing.client import reason_of
from brlite.proxy.routing.health import HealthChecks
from brlite.proxy.routing.route_table import Route, RouteTable
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.usage import (
    NO_USAGE,
    ForwardedUsage,
    estimate_completion,
    estimate_prompt,
    is_possible,
    reported_usage,
)
from brlite.proxy.wire.heads import MAX_HOPS, RequestHead, forwarded_lines, stored_response_id, with_own_idempotency_key

logger = logging.getLogger(__name__)

MAX_TIMER_SECONDS = 1.0
MISSING_SECONDS = 60.0  # an upstream that answered 404 for a model is tried again after this time


class Forwarder:
    """Forwards requests inside `async with`, which checks the upstreams' health. Its exit closes all connections.

    `answers` counts finished requests by model and status, `num_first_bytes` those that got a byte from an upstream.
    `seconds` and `first_byte_seconds` are the sums of their durations.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, config: Config) -> None:
        """Reads key and certificate files of the upstreams. Raises `ConfigError`."""
        self.config: ProxyConfig = config.proxy
        self.table = RouteTable(config)
        self.is_draining = False
        self.answers: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_first_bytes: Counter[str] = Counter()
        self.first_byte_seconds: defaultdict[str, float] = defaultdict(float)
        self.owners = ResponseOwners(config.limits.max_owner_bytes)
        self._background = BackgroundUsage(self.owners, lambda name: self.table.upstream(name))
        self._comment_seconds = config.limits.sse_comment_seconds
        self._health = HealthChecks()
        self._via_name = f"brlite-{secrets.token_hex(4)}".encode()
        self.via = b"1.1 " + self._via_name
        self.request_headers = (*config.proxy.request_headers, config.proxy.sticky_header)
        self._active: set[Exchange] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Forwarder:
        self.loop = asyncio.get_running_loop()
        self._health.watch(self.table.upstreams, self.config)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()
        await self._health.close()
        await self._background.close()
        for upstream in self.table.upstreams:
            upstream.pool.close()

    @property
    def num_active(self) -> int:
        """The number of running requests."""
        return len(self._active)

    def replace(self, config: Config, table: RouteTable) -> None:
        """Use another config. Running requests continue, as do connections to upstreams that remain.

        The caller makes `table` from `config` and the current table, since that reads files.
        """
        kept = set(table.upstreams)
        gone = {upstream.name: upstream for upstream in self.table.upstreams if upstream not in kept}
        for upstream in table.upstreams:
            if upstream.name in gone:
                upstream.continue_counts(gone[upstream.name])
        self.config, self.table = config.proxy, table
        self.request_headers = (*config.proxy.request_headers, config.proxy.sticky_header)
        self._health.watch(table.upstreams, config.proxy)
        for upstream in gone.values():
            upstream.pool.drain()

    def forward(self, inbound: Inbound, route: Route, downstream: Downstream) -> Exchange:
        """Make an exchange. The caller calls its `start`.

        Raises `LoopDetected`, `RateLimited`, `NotReady` while the server stops, and `InvalidRequest` for a stored
        response that is not known to belong to the key.
        """
        head, config = inbound.head, self.config
        if head.via is not None:
            if self._via_name in head.via:
                text = "The request came back to a server that had forwarded it: look at who serves the model."
                raise LoopDetected(text)
            if head.via.count(b",") + 1 >= MAX_HOPS:
                raise LoopDetected(f"The request was forwarded {MAX_HOPS} times: look at who serves the model.")
        if head.target.startswith(RESPONSES_PATH):
            owner = self.owners.owner_for(inbound, self._active)
            only = route if owner is None else route.only(owner.upstream)
            if only is None:
                text = "The response is stored by an upstream that does not serve this model."
                raise InvalidRequest(text, param="previous_response_id", code="previous_response_not_found")
            route = only
        lines = head.lines_for_upstreams(downstream.request_id, self.via, self.request_headers)
        if (idempotency_key := head.fields.get(b"idempotency-key")) and inbound.key.tenant:
            lines = with_own_idempotency_key(lines, idempotency_key, inbound.key.tenant)
        if config.forwarded != "off":
            lines += forwarded_lines(config.forwarded, downstream.peer, head.fields)
        affinity = None
        if config.choice == "prefix":
            affinity = prompt_start(inbound.body, config.prefix_bytes) or None
        elif config.choice == "sticky":
            session = head.fields.get(config.sticky_header.lower().encode())
            affinity = session or (inbound.user.encode() if inbound.user else None)
        if self.is_draining:
            raise stopping()
        if inbound.key.has_rules:
            inbound.key.begin(time.monotonic(), route.model, inbound.model or "")
        exchange = Exchange(self, ForwardedRequest(inbound, lines, affinity), route, downstream)
        self._active.add(exchange)
        if self._timer is None:
            self._start_timer()
        return exchange

    def find_stored(self, head: RequestHead, key: ApiKey) -> Route | None:
        """The route to the stored response that a request names. None if no upstream has stored it for this key."""
        response_id = stored_response_id(head)
        owner = None if response_id is None else self.owners.find(key.tenant, response_id, self._active)
        route = None if owner is None else self.table.find(owner.model)
        return None if owner is None or route is None else route.only(owner.upstream)

    async def settle(self, inbound: Inbound) -> None:
        """Charge the key for a background response that this request will delete.

        This may cancel the response. So call it only for a request that `forward` has admitted.
        """
        if inbound.head.method == b"DELETE" and (response_id := stored_response_id(inbound.head)) is not None:
            await self._background.settle(inbound.key, response_id)

    def over(self, exchange: Exchange) -> None:
        """Count an exchange that has ended, and charge its key."""
        self._active.discard(exchange)
        model, attempt, started_at = exchange.route.model, exchange.attempt, exchange.started_at
        self.answers[model, exchange.status] += 1
        self.seconds[model] += self.loop.time() - started_at
        if attempt is not None and attempt.first_byte_at is not None:
            self.num_first_bytes[model] += 1
            self.first_byte_seconds[model] += attempt.first_byte_at - started_at
        key = exchange.request.inbound.key
        if key.has_rules:
            key.end()
        head, made = exchange.request.inbound.head, None
        usage, is_reported = self._usage(exchange) if key.name else (NO_USAGE, False)
        if head.target.startswith(RESPONSES_PATH):
            if key.name and attempt is not None and (stored := stored_response_id(head)) is not None:
                self._background.charge(key, stored, attempt.seen)
            made = self.owners.note(exchange)
        if key.name and made is not None and made.is_running:
            self._background.follow(key, made.id, usage, exchange.num_reserved)
        elif key.name:
            key.spend(time.monotonic(), *usage, num_reserved=exchange.num_reserved)
            if made is not None:
                self.owners.note_charge(key.tenant, made.id, usage, is_reported=is_reported)

    def reserve(self, exchange: Exchange) -> None:
        """Charge the key an estimate of the prompt's tokens when the request is sent; `over` corrects it."""
        inbound = exchange.request.inbound
        exchange.num_reserved = estimate_prompt(inbound.head.target, inbound.body)
        inbound.key.reserve(time.monotonic(), exchange.num_reserved)

    def _usage(self, exchange: Exchange) -> tuple[ForwardedUsage, bool]:
        """The tokens of a request that are to be charged, and whether its response reports them; else an estimate.

        0 for a request that the upstream refused: by an answer from 400 on, or by a stream that has an error and no
        text. A client that disconnects pays for its prompt even if no response had begun.
        """
        attempt, inbound = exchange.attempt, exchange.request.inbound
        if attempt is None or not attempt.was_sent:
            return NO_USAGE, False
        seen = attempt.seen
        if inbound.head.target.startswith(RESPONSES_PATH) and stored_response_id(inbound.head) is not None:
            return NO_USAGE, False  # charged by `BackgroundUsage`
        has_answer = attempt.has_begun and attempt.status < 400
        if not (has_answer or exchange.status == CLIENT_LEFT):
            return NO_USAGE, False
        usage = reported_usage(seen.parts)
        if seen.is_refusal and not (usage and usage.completion_tokens):
            return NO_USAGE, False
        if usage is not None:
            if is_possible(usage, len(inbound.body), seen.num_text_bytes):
                return usage, True
            text = "upstream %s reports impossible usage for a request of %d bytes: %d and %d tokens; estimated instead"
            logger.warning(text, attempt.upstream.name, len(inbound.body), *usage)
        elif not seen.num_events and (made := stored_response(seen.parts)) is not None and made.is_running:
            return ForwardedUsage(exchange.num_reserved), False  # nothing is generated yet
        return ForwardedUsage(exchange.num_reserved, estimate_completion(inbound.head.target, seen)), False

    def report_failure(self, upstream: Upstream, error: RequestError) -> None:
        """Log why an upstream failed a request."""
        cause = error.__cause__
        logger.warning("upstream %s: %s", upstream.name, error if cause is None else f"{error} ({reason_of(cause)})")

    def report_missing(self, upstream: Upstream, model: str) -> None:
        """Note for 60 s that an upstream does not have the model. Log it the first time."""
        if model not in upstream.missing:
            text = "upstream %s answers 404 for the model %s: it is tried only if no other upstream has the model"
            logger.warning(text, upstream.name, model)
        upstream.missing[model] = max(upstream.missing.get(model, 0.0), self.loop.time() + MISSING_SECONDS)

    def stop(self) -> None:
        """End all running exchanges with an error."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for exchange in list(self._active):
            exchange.stop()

    # One timer for all exchanges: a timer for each stream would have to be reset at each of its events.

    def _start_timer(self) -> None:
        config = self.config
        limits = (config.connect_seconds, config.first_byte_seconds, config.idle_seconds, config.max_queue_seconds)
        shortest = min(*limits, self._comment_seconds)
        self._timer = self.loop.call_later(min(MAX_TIMER_SECONDS, shortest / 4), self._check_deadlines)

    def _check_deadlines(self) -> None:
        self._timer = None
        now = self.loop.time()
        lost = [upstream for upstream in self.table.upstreams if upstream.lost_since is not None]
        for exchange in list(self._active):
            if exchange.deadline <= now:
                exchange.time_is_up()
                continue
            if lost and exchange.upstream in lost:
                exchange.upstream_is_lost(now)
            exchange.comment_if_silent(now, self._comment_seconds)
        if self._active and self._timer is None:
            self._start_timer()

"""What all exchanges share: the table of upstreams, the clock over their deadlines, and the count of what they did.

It begins exchanges and hears of their end; how one goes is its own affair.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Mapping

from brlite.config.options import Config, ProxyConfig
from brlite.errors import LoopDetected, RequestError, stopping
from brlite.http.error_middleware import CLIENT_LEFT
from brlite.proxy.downstream import Downstream
from brlite.proxy.exchange import Exchange, ForwardedRequest
from brlite.proxy.forwarded import forwarded_lines
from brlite.proxy.prompt_start import prompt_start
from brlite.proxy.request_model import RequestModel
from brlite.proxy.routing.client import reason_of
from brlite.proxy.routing.health import HealthChecks
from brlite.proxy.routing.route_table import Route, RouteTable
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.usage import ForwardedUsage, estimate_completion, estimate_prompt, is_possible, told_usage
from brlite.proxy.wire.heads import MAX_HOPS

logger = logging.getLogger(__name__)

MAX_TICK_SECONDS = 1.0
MISSING_SECONDS = 60.0  # for so long a 404 for a model is believed: then one request finds out


class Forwarder:
    """Passes requests on. `async with` it while requests may come; then no connection of its own is left open.

    While inside, its upstreams are checked. `answers` counts finished requests by model and status, `num_first_bytes`
    those that got a byte from an upstream; `seconds` and `first_byte_seconds` add up what they took.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, config: Config) -> None:
        """Reads the files that the upstreams name. Raises `ConfigError`."""
        self.config: ProxyConfig = config.proxy
        self.table = RouteTable(config)
        self.is_draining = False
        self.answers: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_first_bytes: Counter[str] = Counter()
        self.first_byte_seconds: defaultdict[str, float] = defaultdict(float)
        self._health = HealthChecks()
        self._via_name = f"brlite-{secrets.token_hex(4)}".encode()
        self.via = b"1.1 " + self._via_name
        self.request_headers = _request_headers(config.proxy)
        self._active: set[Exchange] = set()
        self._tick: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Forwarder:
        self.loop = asyncio.get_running_loop()
        self._health.watch(self.table.upstreams, self.config)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()
        await self._health.close()
        for upstream in self.table.upstreams:
            upstream.pool.close()

    @property
    def num_active(self) -> int:
        """How many requests are on their way."""
        return len(self._active)

    def replace(self, config: Config, table: RouteTable) -> None:
        """Forward by another config from now on; what is under way stays on its way, and so do kept connections.

        `table` was made from the config and from the present table. It is given because making one reads files.
        """
        gone = {upstream.name: upstream for upstream in self.table.upstreams if upstream not in table.upstreams}
        for upstream in table.upstreams:
            if upstream.name in gone:
                upstream.continue_counts(gone[upstream.name])
        self.config, self.table = config.proxy, table
        self.request_headers = _request_headers(config.proxy)
        self._health.watch(table.upstreams, config.proxy)
        for upstream in gone.values():
            upstream.pool.drain()

    def check_hops(self, via: bytes | None) -> None:
        """Raise `LoopDetected` for a request that was here before, or has come too far, by its `Via` header."""
        if via is None:
            return
        if self._via_name in via:
            raise LoopDetected("The request came back to a server that had forwarded it: look at who serves the model.")
        if via.count(b",") + 1 >= MAX_HOPS:
            raise LoopDetected(f"The request was forwarded {MAX_HOPS} times: look at who serves the model.")

    def affinity(self, body: bytes, seen: RequestModel, fields: Mapping[bytes, bytes]) -> bytes | None:
        """What chooses the upstream of a request, if the config says that something does."""
        if self.config.choice == "prefix":
            return prompt_start(body, self.config.prefix_bytes) or None
        if self.config.choice == "sticky":
            session = fields.get(self.config.sticky_header.lower().encode())
            return session or (seen.user.encode() if seen.user else None)
        return None

    def client_lines(self, peer: str | None, fields: Mapping[bytes, bytes]) -> bytes:
        """The header lines that tell an upstream who the client is, if the config says that something does."""
        mode = self.config.forwarded
        return b"" if mode == "off" else forwarded_lines(mode, peer, fields)

    def forward(self, request: ForwardedRequest, target: Route, downstream: Downstream) -> Exchange:
        """Begin to pass a request on. Raises `RateLimited`, or `NotReady` while the server stops."""
        if self.is_draining:
            raise stopping()
        request.key.begin(time.monotonic())
        exchange = Exchange(self, request, target, downstream)
        self._active.add(exchange)
        if self._tick is None:
            self._set_tick()
        return exchange

    def over(self, exchange: Exchange) -> None:
        """The exchange has ended."""
        self._active.discard(exchange)
        now, model = self.loop.time(), exchange.target.model
        self.answers[model, exchange.status] += 1
        self.seconds[model] += now - exchange.started_at
        if exchange.first_byte_at is not None:
            self.num_first_bytes[model] += 1
            self.first_byte_seconds[model] += exchange.first_byte_at - exchange.started_at
        key = exchange.request.key
        key.end()
        if key.name:
            usage, at = self._usage(exchange), time.monotonic()
            key.spend(at, usage.prompt_tokens, usage.completion_tokens, num_reserved=exchange.num_reserved)

    def reserve(self, exchange: Exchange) -> None:
        """Charge the key for the prompt, by an estimate, as the request is sent. It is corrected in the end."""
        request = exchange.request
        if request.key.name:
            exchange.num_reserved = estimate_prompt(request.path, request.body)
            request.key.reserve(time.monotonic(), exchange.num_reserved)

    def _usage(self, exchange: Exchange) -> ForwardedUsage:
        """The tokens that a request took, as its answer says, or an estimate. None if no good answer had begun.

        A client that leaves pays for its prompt, whether an answer had begun or not.
        """
        has_answer = exchange.has_begun and exchange.answer_status < 400
        if not exchange.was_sent or not (has_answer or exchange.status == CLIENT_LEFT):
            return ForwardedUsage()
        request, seen = exchange.request, exchange.seen
        told = told_usage(seen.parts)
        if told is not None:
            if is_possible(told, len(request.body), seen.num_text_bytes):
                return told
            assert exchange.upstream is not None
            text = "upstream %s: a request of %d bytes cannot have used the %d and %d tokens that it says: not believed"
            logger.warning(text, exchange.upstream.name, len(request.body), *told)
        return ForwardedUsage(exchange.num_reserved, estimate_completion(request.path, seen))

    def report_failure(self, upstream: Upstream, error: RequestError) -> None:
        """Log that an upstream failed a request, and why."""
        cause = error.__cause__
        logger.warning("upstream %s: %s", upstream.name, error if cause is None else f"{error} ({reason_of(cause)})")

    def report_missing(self, upstream: Upstream, model: str) -> None:
        """Believe an upstream that it does not have the model, for a while; the log says so the first time."""
        if model not in upstream.missing:
            text = "upstream %s answers 404 for the model %s: it is asked for it only if no other has it"
            logger.warning(text, upstream.name, model)
        upstream.missing[model] = max(upstream.missing.get(model, 0.0), self.loop.time() + MISSING_SECONDS)

    def stop(self) -> None:
        """End what is still on its way, each with an error."""
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        for exchange in list(self._active):
            exchange.stop()

    # One clock for all: a timer for each of a thousand streams would be set anew with each of their events.

    def _set_tick(self) -> None:
        config = self.config
        limits = (config.connect_seconds, config.first_byte_seconds, config.idle_seconds, config.max_queue_seconds)
        self._tick = self.loop.call_later(min(MAX_TICK_SECONDS, min(limits) / 4), self._look)

    def _look(self) -> None:
        self._tick = None
        now = self.loop.time()
        lost = [upstream for upstream in self.table.upstreams if upstream.lost_since is not None]
        for exchange in list(self._active):
            if exchange.deadline <= now:
                exchange.time_is_up()
            elif lost and exchange.upstream in lost:
                exchange.upstream_is_lost(now)
        if self._active and self._tick is None:
            self._set_tick()


def _request_headers(config: ProxyConfig) -> tuple[str, ...]:
    """The names of clients' headers that upstreams see beside those that always go on."""
    return (*config.request_headers, config.sticky_header)

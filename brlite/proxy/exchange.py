"""One forwarded request and its response, with retries at other upstreams.

Another upstream may be tried until the first byte of a response was sent to the client, and only if the last one has
certainly computed nothing: it could not be connected to, a kept connection was closed already, or it refused (401, 403,
429, 503, a 404 for the model). After that byte, a broken stream ends with an error event; for any other response the
connection is closed.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Protocol

import msgspec

from brlite.config.options import ProxyConfig
from brlite.errors import QueueTimeout, RequestError, UpstreamUnavailable, stopping
from brlite.http.errors import CLIENT_LEFT, status_of
from brlite.proxy.attempt import UPSTREAM_RETRY_SECONDS, Attempt, Downstream
from brlite.proxy.outcomes import OUTCOMES, Ending
from brlite.proxy.request_model import Inbound, replace_model
from brlite.proxy.routing.concurrency import ConcurrencyLimit, Waiting
from brlite.proxy.routing.listing import says_no_model
from brlite.proxy.routing.route_table import Route, RouteTable
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.wire.heads import AnswerHead

MAX_PAUSE_SECONDS = 60.0  # a longer Retry-After is cut to this


class ExchangeState(enum.Enum):
    """Where an exchange is. Events and what follows from them:

    | event                             | ADMITTED         | QUEUED | TRYING                              |
    |-----------------------------------|------------------|--------|-------------------------------------|
    | started                           | TRYING; QUEUED   |        |                                     |
    |                                   | if the limit is  |        |                                     |
    |                                   | reached          |        |                                     |
    | its turn in the queue             |                  | TRYING |                                     |
    | refused or failed, may be retried |                  |        | TRYING; QUEUED if the limit of a    |
    |                                   |                  |        | fallback is reached                 |
    | answered, failed for good         |                  |        | DONE                                |
    | timeout                           |                  | DONE   | DONE                                |
    | client left, server stop          | DONE             | DONE   | DONE                                |
    | dropped from a full queue         |                  | DONE   |                                     |
    """

    ADMITTED = enum.auto()  # counted under its key, but not started
    QUEUED = enum.auto()  # it waits in the queue of the model's concurrency limit
    TRYING = enum.auto()  # it has acquired the limit, and an attempt is running
    DONE = enum.auto()


# Module names for the members: before Python 3.12, a lookup in the enum takes 0.1 µs.
ADMITTED, QUEUED, TRYING, DONE = ExchangeState


class ExchangeOwner(Protocol):
    """The part of the forwarder that an exchange uses."""

    loop: asyncio.AbstractEventLoop
    config: ProxyConfig
    table: RouteTable

    def reserve(self, exchange: Exchange) -> None: ...
    def over(self, exchange: Exchange) -> None: ...
    def report_failure(self, upstream: Upstream, error: RequestError) -> None: ...
    def report_missing(self, upstream: Upstream, model: str) -> None: ...


class ForwardedRequest(msgspec.Struct, frozen=True):
    """The parts of a request that are forwarded. `lines` are the header lines for any upstream.

    `affinity` is the value that the upstream is chosen by, with `proxy.choice` "prefix" or "sticky".
    """

    inbound: Inbound
    lines: bytes
    affinity: bytes | None


class Exchange:
    """One running request. Calls `ended` of the downstream exactly once.

    `attempt` is the current attempt, or the last one until the exchange has ended. `num_reserved` are the tokens that
    the API key was charged for the prompt when it was sent.
    """

    __slots__ = (
        "_downstream",
        "_forwarder",
        "_limit",
        "_queue_deadline",
        "_requested_route",
        "_tried",
        "_waiting",
        "attempt",
        "num_reserved",
        "request",
        "route",
        "started_at",
        "state",
        "status",
    )

    _limit: ConcurrencyLimit  # acquired in TRYING, waited for in QUEUED
    _waiting: Waiting  # QUEUED
    _queue_deadline: float  # QUEUED

    def __init__(
        self, forwarder: ExchangeOwner, request: ForwardedRequest, route: Route, downstream: Downstream
    ) -> None:
        self._forwarder = forwarder
        self._downstream = downstream
        self._requested_route = route
        self._tried: tuple[Upstream, ...] = ()  # one for each attempt
        self.request = request
        self.route = route  # or the route of the fallback that was taken
        self.state = ADMITTED
        self.attempt: Attempt | None = None
        self.started_at = forwarder.loop.time()
        self.status = 0  # of the response to the client; 0: there is none yet
        self.num_reserved = 0

    @property
    def upstream(self) -> Upstream | None:
        """The upstream of the last attempt."""
        return self._tried[-1] if self._tried else None

    @property
    def deadline(self) -> float:
        """The loop's time at which `time_is_up` is to be called."""
        if self.state is QUEUED:
            return self._queue_deadline
        return self.attempt.deadline if self.attempt is not None else math.inf

    def log_fields(self) -> dict[str, object]:
        """The exchange's fields in the access log."""
        fields: dict[str, object] = {"model": self._requested_route.model}
        if self.route.model != self._requested_route.model:
            fields["fallback"] = self.route.model
        if self._tried:
            fields["upstream"] = self._tried[-1].name
        if len(self._tried) > 1:
            fields["tries"] = len(self._tried)
        return fields

    # The concurrency limit and the upstream

    def start(self) -> None:
        """Acquire the model's concurrency limit, or wait in its queue. Does nothing if the exchange has ended."""
        if self.state is DONE:
            return
        key = self.request.inbound.key
        limit = self._limit = self.route.limit
        if limit.acquire(key.tenant):
            self._try_next()
            return
        self.state = QUEUED
        self._queue_deadline = self._forwarder.loop.time() + self._forwarder.config.max_queue_seconds
        try:
            self._waiting = limit.wait(key.tenant, self._try_next, self._end_with, weight=key.weight)
        except RequestError as error:
            self._downstream.refuse(error)
            self._close(status_of(error).http)

    def _try_next(self) -> None:
        if self.state is QUEUED:
            self.route = self._forwarder.table.renewed(self.route)  # a reload may have changed its upstreams
        self.state = TRYING
        now = self._forwarder.loop.time()
        route = self.route
        if route.fallbacks and not route.is_available(now, self._tried):
            fallback = self._fallback(now)
            if fallback is not None:
                self._limit.release(self.request.inbound.key.tenant)
                self.route = fallback
                self.start()
                return
        upstream = route.choose(now, self.request.affinity, self._tried)
        if upstream is None:
            text = "No upstream of the model can be reached."
            self._give_up(UpstreamUnavailable(text, retry_after_seconds=UPSTREAM_RETRY_SECONDS))
        else:
            self._try(upstream)

    def _fallback(self, now: float) -> Route | None:
        """The first fallback that the key may use and that is available."""
        may_use = self.request.inbound.key.may_use
        for model in self.route.fallbacks:
            if may_use(model) and self.route.routes[model].is_available(now, self._tried):
                return self.route.routes[model]
        return None

    def _try(self, upstream: Upstream, *, is_fresh: bool = False) -> None:
        request, forwarder = self.request, self._forwarder
        inbound = request.inbound
        body, name = inbound.body, self.route.name_at(upstream)
        if inbound.model is not None and inbound.model != name:  # a body that names no model stays as it is
            try:
                body = replace_model(body, name)
            except RequestError as error:
                self._give_up(error)
                return
        if inbound.key.name and not self._tried:
            forwarder.reserve(self)
        self._tried += (upstream,)
        attempt = self.attempt = Attempt(self, upstream, self._downstream, forwarder.config, forwarder.loop)
        attempt.start(inbound.head, request.lines, body, is_fresh=is_fresh)

    # How an attempt ends

    def attempt_completed(self) -> None:
        assert self.attempt is not None
        self._limit.release(self.request.inbound.key.tenant)
        self._close(self.attempt.status)

    def attempt_refused(self, head: AnswerHead, ending: Ending) -> bool:
        """Keep the upstream's Retry-After, and try another upstream. False if no other is left."""
        attempt = self._current
        now = self._forwarder.loop.time()
        attempt.upstream.refuses_until = now + pause_seconds(head)
        if not self._may_try_another(attempt, now):
            return False
        attempt.close(ending)
        self._try_next()
        return True

    def attempt_found_no_model(self, body: bytes) -> bool:
        """Read a 404, and try another upstream if this one does not have the model. False if no other is left."""
        attempt = self._current
        name, upstream = self.route.name_at(attempt.upstream), attempt.upstream
        if self.request.inbound.model is None or not says_no_model(body, name):
            return False
        self._forwarder.report_missing(upstream, name)
        if not self._may_try_another(attempt, self._forwarder.loop.time()):
            return False
        attempt.close(Ending.NO_MODEL)
        upstream.counts.num_retries += 1
        self._try_next()
        return True

    def attempt_failed(self, error: RequestError, ending: Ending) -> None:
        attempt = self._current
        upstream = attempt.upstream
        self._forwarder.report_failure(upstream, error)
        if ending is Ending.STALE and self._may_try_again(attempt):
            attempt.close(ending)
            upstream.counts.num_retries += 1
            self._try(upstream, is_fresh=True)
        elif OUTCOMES[ending].is_safe and self._may_try_another(attempt, self._forwarder.loop.time()):
            attempt.close(ending)
            upstream.counts.num_retries += 1
            self._try_next()
        else:
            # Without a retry, a lost kept connection counts as a broken response.
            attempt.close(Ending.BROKEN if ending is Ending.STALE else ending)
            self._give_up(error, attempt)

    @property
    def _current(self) -> Attempt:
        """The running attempt."""
        assert self.attempt is not None  # in state TRYING
        return self.attempt

    def _may_try_again(self, attempt: Attempt) -> bool:
        return not attempt.has_begun and len(self._tried) <= self._forwarder.config.max_retries

    def _may_try_another(self, attempt: Attempt, now: float) -> bool:
        if not self._may_try_again(attempt):
            return False
        return self.route.has_untried(now, self._tried) or self._fallback(now) is not None

    def _give_up(self, error: RequestError, attempt: Attempt | None = None) -> None:
        """End with an error: as the response, else as an event of the stream, else by cutting the connection."""
        if attempt is None or not attempt.has_begun:
            self._downstream.refuse(error)
        elif attempt.can_take_event:
            if event := attempt.error_event(error):
                self._downstream.write(event)
        else:
            self._downstream.cut()
        self._limit.release(self.request.inbound.key.tenant)
        self._close(status_of(error).http)

    # The client and the clock

    def pause(self) -> None:
        """Stop reading from the upstream, because the client reads too slowly."""
        if self.state is TRYING and self.attempt is not None:
            self.attempt.pause()

    def resume(self) -> None:
        if self.state is TRYING and self.attempt is not None:
            self.attempt.resume()

    def client_left(self) -> None:
        """Handle a client that disconnected: end the attempt at once, so that the upstream stops computing."""
        if self.state is QUEUED:
            self._waiting.leave()
        elif self.state is TRYING:
            self._current.close(Ending.CLIENT_LEFT)
            self._limit.release(self.request.inbound.key.tenant)
        elif self.state is DONE:
            return
        self._close(CLIENT_LEFT)

    def stop(self) -> None:
        """End with an error, because the server stops and the grace time is over."""
        self._end_with(stopping(UPSTREAM_RETRY_SECONDS))

    def time_is_up(self) -> None:
        """Handle a passed deadline."""
        if self.state is TRYING:
            self._current.time_is_up()
            return
        seconds = self._forwarder.config.max_queue_seconds
        text = f"The request waited {seconds:g} s for its turn (proxy.max_queue_seconds)."
        self._end_with(QueueTimeout(text, retry_after_seconds=UPSTREAM_RETRY_SECONDS))

    def comment_if_silent(self, now: float, seconds: float) -> None:
        """Keep the client's connection open by a comment if its stream has been silent for `seconds`."""
        if self.state is TRYING:
            self._current.comment_if_silent(now, seconds)

    def upstream_is_lost(self, now: float) -> None:
        """Handle failed health checks of the upstream: end the attempt, unless the upstream still sends."""
        if self.state is TRYING:
            self._current.upstream_is_lost(now)

    def _end_with(self, error: RequestError) -> None:
        if self.state is TRYING:
            attempt = self._current
            attempt.close(Ending.STOPPED)
            self._give_up(error, attempt)
        elif self.state is not DONE:
            if self.state is QUEUED:
                self._waiting.leave()
            self._downstream.refuse(error)
            self._close(status_of(error).http)

    def _close(self, status: int) -> None:
        self.state = DONE
        self.status = status
        self._forwarder.over(self)
        self._downstream.ended()
        self.attempt = None  # breaks the reference cycle, which keeps the body in memory


def pause_seconds(head: AnswerHead) -> float:
    """The seconds of a refusal's Retry-After, at most `MAX_PAUSE_SECONDS`."""
    said = head.fields.get(b"retry-after", b"").decode("latin-1")
    if said.isascii() and said.isdigit():
        return min(float(said), MAX_PAUSE_SECONDS)
    try:
        date = parsedate_to_datetime(said)
        # A date without a zone is in UTC (RFC 9110 §5.6.7).
        seconds = date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp() - time.time()
    except (ValueError, OverflowError, TypeError, IndexError):  # all errors that it raises for malformed dates
        return UPSTREAM_RETRY_SECONDS
    return min(max(seconds, UPSTREAM_RETRY_SECONDS), MAX_PAUSE_SECONDS)

"""One request passed on and its answer back, over as many upstreams as it may take.

Until the first byte of an answer has gone to the client another upstream may be tried, but only where nothing can have
been done yet: no connection could be made, a kept one turned out to be dead at once, or the upstream itself refused
(429, 503). After it, a stream that breaks ends with an error event, any other answer with the connection.
"""

from __future__ import annotations

import asyncio
import math
import time
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Protocol

import msgspec

from brlite.config.options import ProxyConfig
from brlite.errors import QueueTimeout, RequestError, UpstreamUnavailable, stopping
from brlite.http.api_key import ApiKey
from brlite.http.error_middleware import CLIENT_LEFT
from brlite.http.errors import status_of
from brlite.proxy.attempt import RETRY_AFTER_SECONDS, Attempt
from brlite.proxy.downstream import Downstream
from brlite.proxy.outcomes import TABLE, Ending
from brlite.proxy.request_model import replace_model
from brlite.proxy.routing.concurrency import Waiter, Waiting
from brlite.proxy.routing.listing import says_no_model
from brlite.proxy.routing.route_table import Route
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.usage import Seen
from brlite.proxy.wire.heads import AnswerHead

MAX_PAUSE_SECONDS = 60.0  # the longest Retry-After that is believed


class ExchangeOwner(Protocol):
    """What an exchange needs of the forwarder that began it: the clock, the config, and somebody to report to."""

    loop: asyncio.AbstractEventLoop
    config: ProxyConfig

    def reserve(self, exchange: Exchange) -> None: ...
    def over(self, exchange: Exchange) -> None: ...
    def report_failure(self, upstream: Upstream, error: RequestError) -> None: ...
    def report_missing(self, upstream: Upstream, model: str) -> None: ...


class ForwardedRequest(msgspec.Struct, frozen=True):
    """What is passed on. `lines` are the header lines that any upstream may see, `model` is the name asked for.

    `affinity` is what chooses the upstream, where the config says that something does.
    """

    path: bytes
    lines: bytes
    body: bytes
    model: str | None
    key: ApiKey
    affinity: bytes | None = None


class Exchange:
    """One request on its way. The front hears of its end once, whatever happens."""

    __slots__ = (
        "_asked",
        "_attempt",
        "_downstream",
        "_forwarder",
        "_is_over",
        "_num_tries",
        "_queue_deadline",
        "_tried",
        "_waiting",
        "answer_status",
        "first_byte_at",
        "has_begun",
        "num_reserved",
        "request",
        "seen",
        "started_at",
        "status",
        "target",
        "upstream",
        "was_sent",
    )

    def __init__(
        self, forwarder: ExchangeOwner, request: ForwardedRequest, target: Route, downstream: Downstream
    ) -> None:
        self._forwarder = forwarder
        self.request = request
        self._downstream = downstream
        self._attempt: Attempt | None = None
        self._waiting: Waiting | None = None
        self._queue_deadline = math.inf
        self._num_tries = 0
        self._tried: tuple[Upstream, ...] = ()
        self._is_over = False
        self._asked = target
        self.target = target
        self.upstream: Upstream | None = None
        self.started_at = forwarder.loop.time()
        self.first_byte_at: float | None = None
        self.status = 0
        self.seen = Seen()
        self.was_sent = False
        self.has_begun = False  # whether the client got any of an answer
        self.answer_status = 0  # as the upstream said it
        self.num_reserved = 0  # tokens that the key was charged for the prompt when it was sent

    @property
    def deadline(self) -> float:
        """The loop's time from which `time_is_up` is due."""
        return self._attempt.deadline if self._attempt is not None else self._queue_deadline

    def log_fields(self) -> dict[str, object]:
        """What the access log says of it."""
        fields: dict[str, object] = {"model": self._asked.model}
        if self.target is not self._asked:
            fields["stand_in"] = self.target.model
        if self.upstream is not None:
            fields["upstream"] = self.upstream.name
        if self._num_tries > 1:
            fields["tries"] = self._num_tries
        return fields

    # A place, an upstream

    def start(self) -> None:
        self._enter(self.target)

    def _enter(self, target: Route) -> None:
        """Take one of the model's places, or wait for one."""
        self.target = target
        if target.places.take(self.request.key.tenant):
            self._try_next()
            return
        try:
            self._waiting = target.places.wait(self.request.key.tenant, Waiter(self._turn_came, self._end_with))
        except RequestError as error:
            self._downstream.refuse(error)
            self._end(status_of(error).http)
            return
        self._queue_deadline = self._forwarder.loop.time() + self._forwarder.config.max_queue_seconds

    def _turn_came(self) -> None:
        self._waiting = None
        self._queue_deadline = math.inf
        self._try_next()

    def _try_next(self) -> None:
        now = self._forwarder.loop.time()
        target = self.target
        if target.stand_ins and not target.is_available(now, self._tried):
            stand_in = self._stand_in(now)
            if stand_in is not None:
                target.places.give_back(self.request.key.tenant)
                self._enter(stand_in)
                return
        upstream = target.choose(now, self.request.affinity, self._tried)
        if upstream is None:
            text = "No upstream of the model can be reached."
            self._give_up(UpstreamUnavailable(text, retry_after_seconds=RETRY_AFTER_SECONDS))
        else:
            self._try(upstream)

    def _stand_in(self, now: float) -> Route | None:
        """The first model that may answer in place of this one, and can."""
        may_use = self.request.key.may_use
        for stand_in in self.target.stand_ins:
            if may_use(stand_in.model) and stand_in.is_available(now, self._tried):
                return stand_in
        return None

    def _try(self, upstream: Upstream, *, is_fresh: bool = False) -> None:
        request, forwarder = self.request, self._forwarder
        try:
            body = _body_for(request, self.target.name_at(upstream))
        except RequestError as error:
            self._give_up(error)
            return
        if not self._num_tries:
            forwarder.reserve(self)
        self._num_tries += 1
        self._tried += (upstream,)
        self.upstream = upstream
        self._attempt = Attempt(self, upstream, self._downstream, forwarder.config, forwarder.loop)
        self._attempt.start(request.path, request.lines, body, is_fresh=is_fresh)

    # How an attempt ends

    def attempt_completed(self) -> None:
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        self._note(attempt)
        self.target.places.give_back(self.request.key.tenant)
        self._end(attempt.status)

    def attempt_refused(self, head: AnswerHead, ending: Ending) -> bool:
        """Note for how long the upstream wants to be left alone, and ask another. False if there is none."""
        assert self._attempt is not None
        now = self._forwarder.loop.time()
        self._attempt.upstream.refuses_until = now + _pause(head)
        if not self._may_try_again(self._attempt) or not self._has_another(now):
            return False
        self._leave(ending)
        self._try_next()
        return True

    def attempt_found_no_model(self, body: bytes) -> bool:
        """Look into a 404, and ask another upstream if this one does not have the model. False if there is none."""
        attempt = self._attempt
        assert attempt is not None
        name, upstream = self.target.name_at(attempt.upstream), attempt.upstream
        if self.request.model is None or not says_no_model(body, name):
            return False
        now = self._forwarder.loop.time()
        self._forwarder.report_missing(upstream, name)
        if not self._may_try_again(attempt) or not self._has_another(now):
            return False
        self._leave(Ending.NO_MODEL)
        upstream.num_retries += 1
        self._try_next()
        return True

    def attempt_failed(self, error: RequestError, ending: Ending) -> None:
        attempt = self._attempt
        assert attempt is not None
        upstream = attempt.upstream
        self._forwarder.report_failure(upstream, error)
        may_try_again = self._may_try_again(attempt)
        if ending is Ending.STALE and may_try_again:
            self._leave(ending)
            upstream.num_retries += 1
            self._try(upstream, is_fresh=True)
            return
        has_another = TABLE[ending].is_safe and may_try_again and self._has_another(self._forwarder.loop.time())
        # A kept connection that is lost where nothing may be tried again is an answer that did not come.
        self._leave(Ending.BROKEN if ending is Ending.STALE else ending)
        if has_another:
            upstream.num_retries += 1
            self._try_next()
        else:
            self._give_up(error, attempt)

    def _may_try_again(self, attempt: Attempt) -> bool:
        return not attempt.has_begun and self._num_tries <= self._forwarder.config.max_retries

    def _has_another(self, now: float) -> bool:
        return self.target.has_untried(now, self._tried) or self._stand_in(now) is not None

    def _leave(self, ending: Ending) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._note(attempt)
            attempt.leave(ending)

    def _note(self, attempt: Attempt) -> None:
        """What is worth knowing of an attempt that is over."""
        self.first_byte_at = attempt.first_byte_at
        self.seen = attempt.seen
        self.was_sent = attempt.was_sent
        self.has_begun = attempt.has_begun
        self.answer_status = attempt.status
        attempt.upstream.num_events += self.seen.num_events

    def _give_up(self, error: RequestError, attempt: Attempt | None = None) -> None:
        """Tell the client, as far as an answer has not begun, or has begun as a stream."""
        if attempt is None or not attempt.has_begun:
            self._downstream.refuse(error)
        elif attempt.can_take_event:
            if event := attempt.error_event(error):
                self._downstream.write(event)
        else:
            self._downstream.cut()
        self.target.places.give_back(self.request.key.tenant)
        self._end(status_of(error).http)

    # The client and the clock

    def pause(self) -> None:
        """The client does not take what it is sent: the upstream has to wait."""
        if self._attempt is not None:
            self._attempt.pause()

    def resume(self) -> None:
        if self._attempt is not None:
            self._attempt.resume()

    def client_left(self) -> None:
        """Nobody waits for the answer any more. The upstream is told at once."""
        if self._is_over:
            return
        if self._waiting is not None:
            self._waiting.leave()
        else:
            self._leave(Ending.CLIENT_LEFT)
            self.target.places.give_back(self.request.key.tenant)
        self._end(CLIENT_LEFT)

    def stop(self) -> None:
        """The server stops, and the grace time is over: end with an error."""
        self._end_with(stopping(RETRY_AFTER_SECONDS))

    def time_is_up(self) -> None:
        """The deadline has passed."""
        if self._attempt is not None:
            self._attempt.time_is_up()
            return
        seconds = self._forwarder.config.max_queue_seconds
        text = f"The request waited {seconds:g} s for its turn."
        self._end_with(QueueTimeout(text, retry_after_seconds=RETRY_AFTER_SECONDS))

    def upstream_is_lost(self, now: float) -> None:
        """It fails its checks. What it still sends shows that it works; wait no longer if it sends nothing."""
        if self._attempt is not None and self._attempt.is_quiet(now):
            self._attempt.upstream_is_lost()

    def _end_with(self, error: RequestError) -> None:
        if self._waiting is not None:
            self._waiting.leave()
            self._downstream.refuse(error)
            self._end(status_of(error).http)
        elif not self._is_over:
            attempt = self._attempt
            self._leave(Ending.STOPPED)
            self._give_up(error, attempt)

    def _end(self, status: int) -> None:
        self._is_over = True
        self.status = status
        self._forwarder.over(self)
        self._downstream.ended()


def _body_for(request: ForwardedRequest, name: str) -> bytes:
    """The request's body, where the upstream calls the model so. One that names no model stays as it is."""
    if request.model is None or request.model == name:
        return request.body
    return replace_model(request.body, name)


def _pause(head: AnswerHead) -> float:
    """For how many seconds an upstream that refused wants to be left alone."""
    said = head.fields.get(b"retry-after", b"").decode("latin-1")
    if said.isascii() and said.isdigit():
        return min(float(said), MAX_PAUSE_SECONDS)
    try:
        date = parsedate_to_datetime(said)
        # Without a zone it is meant in UTC (RFC 9110 §5.6.7).
        seconds = date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp() - time.time()
    except (ValueError, OverflowError, TypeError, IndexError):  # all that it raises for odd dates
        return RETRY_AFTER_SECONDS
    return min(max(seconds, RETRY_AFTER_SECONDS), MAX_PAUSE_SECONDS)

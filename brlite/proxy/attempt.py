"""One attempt to forward a request to one upstream: sends it, reads the response, passes it to the client.

Callbacks, no task: bytes from an upstream are sent on in the same turn of the loop. `buffered_response.py` and
`wire/sse_relay.py` check the response; the attempt's owner, the exchange, decides what follows from a failure.
"""

from __future__ import annotations

import asyncio
import enum
import math
from typing import Protocol

from brlite.config.options import ProxyConfig
from brlite.errors import NotReady, RequestError, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from brlite.proxy.buffered_response import PAGES, BodyRelay, BufferedResponse, body_of_answer, check_response
from brlite.proxy.outcomes import REFUSALS, WRONG_KEY, Ending, ending_of, is_answer, is_own_fault
from brlite.proxy.routing.breaker import Ticket
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.stream_kinds import is_resumed, kind_of
from brlite.proxy.usage import Seen
from brlite.proxy.wire.connections import UpstreamConnection
from brlite.proxy.wire.framing import FramingError
from brlite.proxy.wire.heads import AnswerHead, AnswerReader, RequestHead
from brlite.proxy.wire.sse_relay import SseRelay


class AttemptState(enum.Enum):
    """Where an attempt is. Events and what follows from them:

    | event                          | CONNECTING | SENT              | BUFFERING   | RELAYING |
    |--------------------------------|------------|-------------------|-------------|----------|
    | connected                      | SENT       |                   |             |          |
    | a part of a head, 1xx          |            | SENT              |             |          |
    | a head: stream, other media    |            | RELAYING          |             |          |
    | a head: 401, 403, 429, 503     |            | DONE if refused   |             |          |
    | a head: anything else          |            | BUFFERING         |             |          |
    | more of the body               |            |                   | BUFFERING   | RELAYING |
    | more than `held_bytes`         |            | RELAYING          | RELAYING    |          |
    | the whole response, its end    |            | DONE              | DONE        | DONE     |
    | malformed, lost, timeout, left | DONE       | DONE              | DONE        | DONE     |
    """

    CONNECTING = enum.auto()
    SENT = enum.auto()  # the request is written, the response's head is not complete
    BUFFERING = enum.auto()  # nothing of the response has gone to the client
    RELAYING = enum.auto()  # the client has the head and gets the body as it comes
    DONE = enum.auto()


# Module names for the members: before Python 3.12, a lookup in the enum takes 0.1 µs.
CONNECTING, SENT, BUFFERING, RELAYING, DONE = AttemptState

# If a reused connection is reset within this time after a request was sent, the request was not read.
STALE_SECONDS = 0.1
ONE_WRITE_BYTES = 16 * 1024  # for bodies up to here, a copy behind the head is cheaper than a second write
FULL_READ_BYTES = 64 * 1024  # after so many bytes at once, more may be there
UPSTREAM_RETRY_SECONDS = 1  # after a second another upstream may be free, or connections work again
NOT_FOUND = 404
EVENT_STREAM = b"text/event-stream"
NOTHING_SEEN = Seen()


class Downstream(Protocol):
    """The client's side of an exchange: one client, one response. Implemented in `fast_path.py` and `middleware.py`.

    With `takes_chunks`, `write` gets a chunked body with its chunk framing. `request_id` is the id in the response's
    header, `peer` the client's IP address, None if it has none.
    """

    takes_chunks: bool
    request_id: str
    peer: str | None

    def begin(self, status: int, lines: bytes, length: int | None) -> None:
        """Send the head of a response with a body of `length` bytes; None: in chunks, or until the connection ends."""

    def write(self, data: bytes) -> None:
        """Send a part of the body."""

    def answer(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a complete response."""

    def refuse(self, error: RequestError) -> None:
        """Send an error as the complete response."""

    def cut(self) -> None:
        """End the connection: the response that has begun cannot be completed."""

    def ended(self) -> None:
        """Called at the end of the exchange: the response has been sent or cut, or the request refused."""


class Listener(Protocol):
    """The owner of an attempt. Each attempt ends with one of these calls, or with `Attempt.close`."""

    def attempt_completed(self) -> None:
        """The whole response was sent to the client."""

    def attempt_refused(self, head: AnswerHead, ending: Ending) -> bool:
        """The upstream answers 429 or 503. True if another upstream is tried; else this response is forwarded."""

    def attempt_found_no_model(self, body: bytes) -> bool:
        """The upstream answers 404. True if it lacks the model and another is tried; else this one is forwarded."""

    def attempt_failed(self, error: RequestError, ending: Ending) -> None:
        """There is no response, or it is incomplete."""


class Attempt:
    """One request at one upstream.

    `deadline` is the loop's time at which `time_is_up` is to be called. `has_begun`: a part of the response was sent to
    the client.
    """

    __slots__ = (
        "_buffered",
        "_config",
        "_connection",
        "_dialing",
        "_downstream",
        "_head",
        "_heard_at",
        "_inbound",
        "_length",
        "_loop",
        "_outbound",
        "_owner",
        "_reader",
        "_relay",
        "_seen",
        "_sent_at",
        "_ticket",
        "_written_at",
        "deadline",
        "first_byte_at",
        "has_begun",
        "state",
        "status",
        "upstream",
    )

    _inbound: RequestHead  # the client's
    _outbound: tuple[bytes, bytes]  # the head and the body for the upstream
    _ticket: Ticket
    _dialing: asyncio.Task[UpstreamConnection]  # CONNECTING
    _connection: UpstreamConnection  # from SENT on
    _reader: AnswerReader  # SENT
    _head: AnswerHead  # after SENT
    _length: int | None  # after SENT: the Content-Length
    _buffered: BufferedResponse  # BUFFERING
    _relay: SseRelay | BodyRelay  # RELAYING

    def __init__(
        self,
        owner: Listener,
        upstream: Upstream,
        downstream: Downstream,
        config: ProxyConfig,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._owner = owner
        self._downstream = downstream
        self._config = config
        self._loop = loop
        self._sent_at = self._heard_at = self._written_at = 0.0
        self.state = CONNECTING
        self.upstream = upstream
        self.deadline = math.inf
        self.status = 0  # of the response; 0: there is none yet
        self.first_byte_at: float | None = None
        self.has_begun = False
        self._seen = NOTHING_SEEN

    @property
    def was_sent(self) -> bool:
        """Whether the request was sent to the upstream."""
        return self._heard_at > 0

    @property
    def seen(self) -> Seen:
        """What was read of the response: while it is relayed, what has come so far; else known at the end."""
        return self._relay.seen if self.state is RELAYING else self._seen

    @property
    def can_take_event(self) -> bool:
        """Whether the response is a stream after which an error event can be sent."""
        return self.has_begun and self._relay.can_take_event

    def error_event(self, error: RequestError) -> bytes:
        """The bytes that end a stream with an error event, if `can_take_event`."""
        return self._relay.error_event(error)

    # The request

    def start(self, head: RequestHead, lines: bytes, body: bytes, *, is_fresh: bool) -> None:
        """Send the request with these header lines and this body. With `is_fresh` it opens a new connection for it."""
        upstream, path = self.upstream, head.target
        self._inbound = head
        self._ticket = upstream.begin(self._loop.time())
        if head.method == b"POST":
            own_lines = upstream.known_head_lines.get(path) or upstream.head_lines(path)
            self._outbound = b"%b%bContent-Length: %d\r\n\r\n" % (own_lines, lines, len(body)), body
        else:
            self._outbound = b"%b%b\r\n" % (upstream.head_lines(path, head.method), lines), b""
        connection = None if is_fresh else upstream.pool.take()
        if connection is not None:
            self._send(connection)
            return
        self.deadline = self._loop.time() + self._config.connect_seconds
        self._dialing = self._loop.create_task(upstream.pool.dial())
        self._dialing.add_done_callback(self._dialed)

    def _dialed(self, dialing: asyncio.Task[UpstreamConnection]) -> None:
        if self.state is DONE:
            self.upstream.pool.adopt(dialing)
            return
        error = dialing.exception()
        if error is None and not dialing.result().transport.is_closing():
            self._send(dialing.result())
        elif is_own_fault(error):
            text = "The server cannot open another connection at the moment."
            exhausted = NotReady(text, retry_after_seconds=UPSTREAM_RETRY_SECONDS)
            exhausted.__cause__ = error
            self._owner.attempt_failed(exhausted, Ending.OUT_OF_RESOURCES)
        else:
            text = "The upstream cannot be reached."
            unreachable = UpstreamUnavailable(text, retry_after_seconds=UPSTREAM_RETRY_SECONDS)
            unreachable.__cause__ = error  # only logged: clients must not see addresses and certificates
            self._owner.attempt_failed(unreachable, Ending.UNREACHABLE)

    def _send(self, connection: UpstreamConnection) -> None:
        self.state = SENT
        self._connection = connection
        self._reader = AnswerReader(self.upstream.heads)
        connection.holder = self
        self._sent_at = self._heard_at = self._loop.time()
        self.deadline = self._sent_at + self._config.first_byte_seconds
        head, body = self._outbound
        if len(body) <= ONE_WRITE_BYTES:
            connection.transport.write(head + body)
        else:
            connection.transport.write(head)
            connection.transport.write(body)

    # The response

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self.deadline < math.inf:  # else the client is slow, and has perhaps not taken the head in these bytes
            self.deadline = self._heard_at + self._config.idle_seconds
        if len(data) >= FULL_READ_BYTES:
            # uvloop would read up to 32 times, 8 MB, before any other connection has its turn.
            self._connection.transport.pause_reading()
            self._loop.call_soon(self.continue_reading)
        if self.state is RELAYING:
            relay = self._relay
            if out := relay.feed(data):
                self._downstream.write(out)
                self._written_at = self._heard_at
            if relay.is_done or relay.error is not None:
                self._end_relay(is_eof=False)
            return
        try:
            if self.state is BUFFERING:
                self._buffer(data)
                return
            if self.first_byte_at is None:
                self.first_byte_at = self._heard_at
            if (found := self._reader.feed(data)) is not None:
                self._begin(*found)
            elif not self._reader.has_part:
                # An interim response is not the first byte of the final one.
                self.first_byte_at = None
                self.deadline = self._sent_at + self._config.first_byte_seconds
        except FramingError as error:
            self._fail(f"The upstream's answer is broken: {error}.")
        except UpstreamError as error:
            self._owner.attempt_failed(error, Ending.BROKEN)

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and not isinstance(error, OSError):  # an exception that `data_received` raised
            failure = NotReady("The server could not take the answer.", retry_after_seconds=UPSTREAM_RETRY_SECONDS)
            failure.__cause__ = error
            self._owner.attempt_failed(failure, Ending.OUT_OF_RESOURCES)
        elif self.state is RELAYING and (error is None or isinstance(self._relay, SseRelay)):
            if out := self._relay.feed_eof():
                self._downstream.write(out)
            self._end_relay(is_eof=True)
        elif self.state is BUFFERING and (error is None or self.status >= 400):
            try:
                self._buffered.feed_eof()
                self._answer(self._buffered.take(), keep=False)
            except FramingError as broken:
                self._fail(f"The upstream's answer is broken: {broken}.")
            except UpstreamError as broken:
                self._owner.attempt_failed(broken, Ending.BROKEN)
        elif self.state is not SENT:
            self._fail("The upstream's answer is broken: its connection was reset.")
        else:
            text = "The upstream ended the connection without an answer."
            self._owner.attempt_failed(UpstreamError(text), Ending.STALE if self._is_stale(error) else Ending.BROKEN)

    def _is_stale(self, error: Exception | None) -> bool:
        """Whether a reused connection was lost before the upstream could read the request from it."""
        connection = self._connection
        if not connection.is_used or self.first_byte_at is not None:
            return False
        if isinstance(error, BrokenPipeError) or connection.has_all_arrived is False:
            return True  # however late a busy event loop sees it
        # An early reset shows that the request was not read. After an orderly end (FIN) it may have been read.
        return error is not None and self._loop.time() - self._sent_at < STALE_SECONDS

    def _begin(self, head: AnswerHead, length: int | None, data: bytes) -> None:
        """Handle a complete head: refuse, relay, answer or buffer."""
        self._head, self._length = head, length
        status = self.status = head.status
        if status in REFUSALS and self._owner.attempt_refused(head, REFUSALS[status]):
            return
        if not self.upstream.breaker.is_untroubled and is_answer(status):
            self.upstream.breaker.answers(self._ticket)
        if status in WRONG_KEY:
            # Not forwarded: it concerns the operator's key, not the client's, and its text may show that key.
            error = UpstreamError(f"The upstream refused this server's access ({status}).")
            self._owner.attempt_failed(error, Ending.DENIED)
        elif status == 200 and head.content_type == EVENT_STREAM:
            if head.fields.get(b"content-encoding", b"identity").lower() != b"identity":
                raise UpstreamError("The upstream's stream is encoded, which it was not asked for.")
            relay = SseRelay(
                body_of_answer(head, length),
                is_chunked=self._downstream.takes_chunks,
                max_event_bytes=self._config.held_bytes,
                kind=kind_of(self._inbound.target),
                is_resumed=is_resumed(self._inbound.target, self._inbound.fields),
            )
            self._begin_relay(relay, head.lines_of_stream(self._config.response_headers), None)
            self.data_received(data)  # also without data: the body may have a length of 0
        elif length == len(data) and head.is_plain and (head.may_be_json or status != 200):
            self._answer(data, keep=True)
        else:
            self._buffered = BufferedResponse(body_of_answer(head, length))
            self.state = BUFFERING
            self._buffer(data)

    def _buffer(self, data: bytes) -> None:
        buffered, head = self._buffered, self._head
        buffered.feed(data)
        is_other_media = head.status == 200 and not head.may_be_json and head.content_type not in PAGES
        if buffered.is_done and not is_other_media:
            self._answer(buffered.take(), keep=not buffered.has_excess)
        elif is_other_media or buffered.num_bytes > self._config.held_bytes:
            is_chunked = self._length is None and self._downstream.takes_chunks
            lines = head.lines_for_clients(self._config.response_headers)
            self._begin_relay(BodyRelay(buffered, is_chunked=is_chunked), lines, self._length)
            self.data_received(b"")  # sends what is buffered

    def _answer(self, payload: bytes, *, keep: bool) -> None:
        """Send a complete response to the client."""
        envelope = check_response(self._head, payload, self._inbound.target.decode("latin-1"))
        if envelope is None:
            lines = self._head.lines_for_clients(self._config.response_headers)
        else:
            lines, payload = envelope.lines, envelope.body
        if self.status == NOT_FOUND and self._owner.attempt_found_no_model(payload):
            return
        self.has_begun = True
        self._downstream.answer(self.status, lines, payload)
        self._seen = Seen((payload,), num_text_bytes=len(payload))
        self._complete(keep=keep)

    def _begin_relay(self, relay: SseRelay | BodyRelay, lines: bytes, length: int | None) -> None:
        self.state = RELAYING
        self.has_begun = True
        self._relay = relay
        self._written_at = self._heard_at
        self._downstream.begin(self.status, lines, length)

    def _end_relay(self, *, is_eof: bool) -> None:
        """Handle the end of a relayed response, which is complete or broken."""
        relay = self._relay
        if relay.is_done:
            self._complete(keep=not (is_eof or relay.has_excess))
        else:
            what = "stream" if isinstance(relay, SseRelay) else "answer"
            self._fail(f"The upstream's {what} is broken: {relay.error}.")

    def comment_if_silent(self, now: float, seconds: float) -> None:
        """Write a comment if the client has received nothing of an event stream for `seconds`.

        Balancers close connections without data. The upstream's own deadline is not extended.
        """
        if self.state is RELAYING and self._written_at + seconds <= now and self.deadline < math.inf:
            self._written_at = now
            if comment := self._relay.comment():
                self._downstream.write(comment)

    # Backpressure

    def pause(self) -> None:
        """Stop reading from the upstream. The deadline is suspended until `resume`."""
        if self.is_connected and not self._connection.transport.is_closing():
            self._connection.transport.pause_reading()
            self.deadline = math.inf

    def resume(self) -> None:
        if self.is_connected and not self._connection.transport.is_closing():
            self._connection.transport.resume_reading()
            self.deadline = self._loop.time() + self._config.idle_seconds

    def continue_reading(self) -> None:
        """Read on after a turn of the loop, unless the client has become slow. The deadline stays."""
        if self.deadline < math.inf and self.is_connected and not self._connection.transport.is_closing():
            self._connection.transport.resume_reading()

    # Ends

    @property
    def is_connected(self) -> bool:
        """Whether it has a connection, which may be closing."""
        return self.state not in (CONNECTING, DONE)

    def time_is_up(self) -> None:
        """Handle a passed deadline."""
        if self._ends_if_whole():
            return
        text, ending = "The upstream stopped answering.", Ending.TIMEOUT
        if self.state is CONNECTING:
            text, ending = "The upstream did not accept a connection.", Ending.CONNECT_TIMEOUT
        elif self.first_byte_at is None:
            text = "The upstream did not begin to answer in time."
        self._owner.attempt_failed(UpstreamTimeout(text), ending)

    def upstream_is_lost(self, now: float) -> None:
        """End the attempt if the upstream has sent nothing for `health_seconds` since its health checks failed.

        Not while reading is paused because the client is slow.
        """
        since = self.upstream.lost_since
        if since is None or not self.is_connected or self.deadline == math.inf:
            return
        if max(since, self._heard_at) + self._config.health_seconds > now or self._ends_if_whole():
            return
        error = UpstreamTimeout("The upstream stopped answering, and it fails its health checks.")
        self._owner.attempt_failed(error, Ending.LOST)

    def _ends_if_whole(self) -> bool:
        """End a stream whose last event has arrived but whose framing has not ended. False for other responses."""
        end = self._relay.end_if_whole() if self.state is RELAYING else None
        if end is None:
            return False
        if end:
            self._downstream.write(end)
        self._complete(keep=False)
        return True

    def _fail(self, text: str) -> None:
        self._owner.attempt_failed(UpstreamError(text), Ending.BROKEN)

    def _complete(self, *, keep: bool) -> None:
        """End the attempt after a complete response."""
        self.close(ending_of(self.status), keep=keep and self._head.keeps_alive and self._connection.has_sent_all)
        self._owner.attempt_completed()

    def close(self, ending: Ending, *, keep: bool = False) -> None:
        """Release the upstream. A connection that is not kept is aborted, so that the upstream stops computing."""
        now = self._loop.time()
        state, self.state = self.state, DONE
        self.deadline = math.inf
        if state is CONNECTING:
            self._dialing.cancel()
        elif keep:
            self.upstream.pool.put_back(self._connection, now)
        else:
            self._connection.abort()
        if state is RELAYING:
            self._seen = self._relay.seen
            self.upstream.counts.num_events += self._seen.num_events
        elif state is BUFFERING and not self.has_begun:
            self._seen = Seen(num_text_bytes=self._buffered.num_bytes)
        self.upstream.end(self._ticket, ending, now)

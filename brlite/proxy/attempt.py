"""One try to have a request answered by one upstream: sends it, reads what comes, passes it on to the client.

Callbacks, no task: what an upstream sends goes out in the same turn of the loop. What an answer must be, stands in
`buffered_response.py` and `wire/sse_relay.py`; what follows from a failure is decided by the owner, the exchange.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from brlite.config.options import ProxyConfig
from brlite.errors import NotReady, RequestError, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from brlite.proxy.buffered_response import BufferedResponse, body_of_answer, is_other_media
from brlite.proxy.downstream import Downstream
from brlite.proxy.outcomes import REFUSALS, Ending, ending_of, is_answer, is_own_fault
from brlite.proxy.routing.breaker import Ticket
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.stream_kinds import kind_of
from brlite.proxy.usage import Seen, usage_in_tail
from brlite.proxy.wire.connections import UpstreamConnection
from brlite.proxy.wire.framing import FramingError
from brlite.proxy.wire.heads import END_OF_HEAD, MAX_ANSWER_HEAD_BYTES, AnswerHead
from brlite.proxy.wire.sse_relay import LAST_CHUNK, SseRelay

# A kept connection that is lost so soon after a request was sent had been closed before the request came.
STALE_SECONDS = 0.1
ONE_WRITE_BYTES = 16 * 1024  # up to here copying a body beside its head is cheaper than a second write
DENIALS = (401, 403)
RETRY_AFTER_SECONDS = 1
NOT_FOUND = 404
MAX_INTERIM_ANSWERS = 100
EVENT_STREAM = b"text/event-stream"


class Listener(Protocol):
    """Whose attempt it is. Each attempt ends with one of these calls, or with `Attempt.leave`."""

    def attempt_completed(self) -> None:
        """The client has the whole answer."""

    def attempt_refused(self, head: AnswerHead, ending: Ending) -> bool:
        """The upstream will not do it. True if the attempt was left for another one, else its answer goes on."""

    def attempt_found_no_model(self, body: bytes) -> bool:
        """The upstream says 404. True if it lacks the model and was left for another one, else its answer goes on."""

    def attempt_failed(self, error: RequestError, ending: Ending) -> None:
        """It came to nothing."""


class Attempt:
    """`deadline` is the loop's time from which `time_is_up` is due; `has_begun` whether the client got any of it."""

    __slots__ = (
        "_body",
        "_config",
        "_connection",
        "_dialing",
        "_downstream",
        "_head",
        "_heard_at",
        "_held",
        "_length",
        "_loop",
        "_num_interim",
        "_owner",
        "_path",
        "_sent_at",
        "_splice",
        "_ticket",
        "_unread",
        "_whole",
        "_wire_head",
        "deadline",
        "first_byte_at",
        "has_begun",
        "upstream",
    )

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
        self._dialing: asyncio.Task[UpstreamConnection] | None = None
        self._connection: UpstreamConnection | None = None
        self._path = self._wire_head = self._body = b""
        self._ticket = Ticket(0, is_probe=False)
        self._sent_at = self._heard_at = 0.0
        self._num_interim = 0
        self._unread = b""  # of a head that is not whole yet
        self._head: AnswerHead | None = None
        self._length: int | None = None
        self._splice: SseRelay | None = None
        self._held: BufferedResponse | None = None
        self._whole: bytes | None = None
        self.upstream = upstream
        self.deadline = math.inf
        self.first_byte_at: float | None = None
        self.has_begun = False

    @property
    def status(self) -> int:
        """The answer's status; 0 before there is one."""
        return self._head.status if self._head is not None else 0

    @property
    def can_take_event(self) -> bool:
        """Whether it is a stream that an event of ours can follow: not within one that goes on in parts."""
        return self._splice is not None and not self._splice.is_within_event

    @property
    def seen(self) -> Seen:
        """What has come that tells how many tokens were used."""
        if self._splice is not None:
            return Seen(self._splice.usage_events, self._splice.num_events, self._splice.num_text_bytes)
        if self._whole is not None:
            return Seen((self._whole,), num_text_bytes=len(self._whole))
        if self._held is not None:
            return Seen(usage_in_tail(self._held.tail), num_text_bytes=self._held.num_bytes)
        return Seen()

    @property
    def was_sent(self) -> bool:
        """Whether the upstream has been given the request."""
        return self._heard_at > 0

    def error_event(self, error: RequestError) -> bytes:
        """What ends a stream that can take it."""
        assert self._splice is not None
        return self._splice.error_event(error)

    # The request

    def start(self, path: bytes, lines: bytes, body: bytes, *, is_fresh: bool) -> None:
        """Send `POST path` with these header lines and this body; `is_fresh` on no connection that was used before."""
        upstream = self.upstream
        self._ticket = upstream.begin(self._loop.time())
        self._path, self._body = path, body
        self._wire_head = b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n" % (
            upstream.target(path),
            upstream.own_headers,
            lines,
            len(body),
        )
        connection = None if is_fresh else upstream.pool.take()
        if connection is not None:
            self._send(connection)
            return
        self.deadline = self._loop.time() + self._config.connect_seconds
        self._dialing = self._loop.create_task(upstream.pool.dial())
        self._dialing.add_done_callback(self._dialed)

    def _dialed(self, dialing: asyncio.Task[UpstreamConnection]) -> None:
        if dialing is not self._dialing:  # the attempt was left meanwhile
            self.upstream.pool.adopt(dialing)
            return
        self._dialing = None
        error = dialing.exception()
        if error is None and not dialing.result().transport.is_closing():
            self._send(dialing.result())
        elif is_own_fault(error):
            text = "The server cannot open another connection at the moment."
            exhausted = NotReady(text, retry_after_seconds=RETRY_AFTER_SECONDS)
            exhausted.__cause__ = error
            self._owner.attempt_failed(exhausted, Ending.OUT_OF_RESOURCES)
        else:
            text = "The upstream cannot be reached."
            unreachable = UpstreamUnavailable(text, retry_after_seconds=RETRY_AFTER_SECONDS)
            unreachable.__cause__ = error  # for the log: addresses and certificates are not the client's affair
            self._owner.attempt_failed(unreachable, Ending.UNREACHABLE)

    def _send(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        connection.holder = self
        self._sent_at = self._heard_at = self._loop.time()
        self.deadline = self._sent_at + self._config.first_byte_seconds
        if len(self._body) <= ONE_WRITE_BYTES:
            connection.transport.write(self._wire_head + self._body)
        else:
            connection.transport.write(self._wire_head)
            connection.transport.write(self._body)

    # What comes back

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self.deadline = self._heard_at + self._config.idle_seconds
        splice = self._splice
        if splice is not None:
            self._feed_stream(splice, data)
            return
        try:
            if self._held is None:
                self._read_head(self._unread + data)
            else:
                self._feed_held(self._held, data)
        except FramingError as error:
            self._fail(f"The upstream's answer is broken: {error}.")
        except UpstreamError as error:
            self._owner.attempt_failed(error, Ending.BROKEN)

    def connection_lost(self, error: Exception | None) -> None:
        connection, self._connection = self._connection, None
        assert connection is not None
        if error is not None and not isinstance(error, OSError):  # asyncio's for what was raised in `data_received`
            failure = NotReady("The server could not take the answer.", retry_after_seconds=RETRY_AFTER_SECONDS)
            failure.__cause__ = error
            self._owner.attempt_failed(failure, Ending.OUT_OF_RESOURCES)
        elif self._splice is not None:
            self._feed_stream_eof(self._splice)
        elif self._held is not None:
            self._feed_held_eof(self._held)
        else:
            text = "The upstream ended the connection without an answer."
            ending = Ending.STALE if self._is_stale(connection, error) else Ending.BROKEN
            self._owner.attempt_failed(UpstreamError(text), ending)

    def _is_stale(self, connection: UpstreamConnection, error: Exception | None) -> bool:
        """Whether a kept connection had been closed before the request came."""
        is_early = self._loop.time() - self._sent_at < STALE_SECONDS and self.first_byte_at is None
        if not connection.is_used or not is_early:
            return False
        # A reset says that the request was not read. A proper end does not: if it had arrived it may have been.
        return error is not None or not connection.has_all_arrived

    def _read_head(self, data: bytes) -> None:
        head, rest = self._next_head(data)
        while head is not None and head.status < 200:
            self._skip_interim(head)
            head, rest = self._next_head(rest)
        if head is None:
            return
        self._head = head
        if head.status in REFUSALS and self._owner.attempt_refused(head, REFUSALS[head.status]):
            return
        if is_answer(head.status):
            self.upstream.breaker.answers(self._ticket)
        if head.status in DENIALS:
            # It is about the operator's key, which its text may show; a client would look for the fault in its own.
            error = UpstreamError(f"The upstream refused this server's access ({head.status}).")
            self._owner.attempt_failed(error, Ending.DENIED)
            return
        if head.status == 200 and head.content_type == EVENT_STREAM:
            self._begin_stream(head, rest)
            return
        held = self._held = BufferedResponse(head, body_of_answer(head, self._length))
        if is_other_media(head):
            held.feed(rest)
            self._begin_long(held)
        else:
            self._feed_held(held, rest)

    def _next_head(self, data: bytes) -> tuple[AnswerHead | None, bytes]:
        """The head at the beginning of `data`, and what follows it; None as long as it is not whole."""
        self._unread = b""
        if not data:
            return None, data
        if self.first_byte_at is None:
            self.first_byte_at = self._loop.time()
        end = data.find(END_OF_HEAD, 0, MAX_ANSWER_HEAD_BYTES) + len(END_OF_HEAD)
        if end < len(END_OF_HEAD):
            self._keep_unread(data)
            return None, b""
        head, self._length = self.upstream.heads.read(data[:end])
        return head, data[end:]

    def _keep_unread(self, data: bytes) -> None:
        if len(data) >= MAX_ANSWER_HEAD_BYTES:
            raise UpstreamError("The upstream's answer has too many headers.")
        if not data.startswith(b"HTTP/1."[: len(data)]):
            raise UpstreamError("The upstream's answer is not HTTP.")
        self._unread = data

    def _skip_interim(self, head: AnswerHead) -> None:
        self._num_interim += 1
        if head.status == 101:
            raise UpstreamError("The upstream wants another protocol.")
        if self._num_interim > MAX_INTERIM_ANSWERS:
            raise UpstreamError("The upstream sends interim answers and no other.")
        # It says nothing of when the answer itself begins.
        self.first_byte_at = None
        self.deadline = self._sent_at + self._config.first_byte_seconds

    # A stream of events

    def _begin_stream(self, head: AnswerHead, rest: bytes) -> None:
        if head.fields.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UpstreamError("The upstream's stream is encoded, which it was not asked for.")
        splice = self._splice = SseRelay(
            body_of_answer(head, self._length),
            is_chunked=self._downstream.takes_chunks,
            max_event_bytes=self._config.held_bytes,
            kind=kind_of(self._path),
        )
        self.has_begun = True
        self._downstream.begin(head.status, head.lines_of_stream(self._config.response_headers), None)
        self._feed_stream(splice, rest)  # nothing too: its length may say that nothing more comes

    def _feed_stream(self, splice: SseRelay, data: bytes) -> None:
        if out := splice.feed(data):
            self._downstream.write(out)
        if splice.is_done:
            self._complete(keep=not splice.has_excess)
        elif splice.error is not None:
            self._fail(f"The upstream's stream is broken: {splice.error}.")

    def _feed_stream_eof(self, splice: SseRelay) -> None:
        if out := splice.feed_eof():
            self._downstream.write(out)
        if splice.is_done:
            self._complete(keep=False)
        else:
            self._fail(f"The upstream's stream is broken: {splice.error}.")

    # Any other answer

    def _feed_held(self, held: BufferedResponse, data: bytes) -> None:
        held.feed(data)
        if self.has_begun:
            self._write_part(held)
        elif held.is_done:
            self._answer(held)
        elif held.num_bytes > self._config.held_bytes:
            self._begin_long(held)

    def _feed_held_eof(self, held: BufferedResponse) -> None:
        try:
            held.feed_eof()
            if self.has_begun:
                self._write_part(held)
            else:
                self._answer(held)
        except FramingError as error:
            self._fail(f"The upstream's answer is broken: {error}.")
        except UpstreamError as error:
            self._owner.attempt_failed(error, Ending.BROKEN)

    def _answer(self, held: BufferedResponse) -> None:
        assert self._head is not None
        self._whole, lines = held.whole()
        if self._head.status == NOT_FOUND and self._owner.attempt_found_no_model(self._whole):
            return
        self.has_begun = True
        if lines is None:
            lines = self._head.lines_for_clients(self._config.response_headers)
        self._downstream.answer(self._head.status, lines, self._whole)
        self._complete(keep=not held.has_excess)

    def _begin_long(self, held: BufferedResponse) -> None:
        """The answer is too long to be kept, or is sound or suchlike: it goes out as it comes."""
        assert self._head is not None
        self.has_begun = True
        self._downstream.begin(
            self._head.status, self._head.lines_for_clients(self._config.response_headers), self._length
        )
        self._write_part(held)

    def _write_part(self, held: BufferedResponse) -> None:
        assert self._head is not None
        is_chunked = self._length is None and self._downstream.takes_chunks
        if part := held.take():
            self._downstream.write(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
        if held.is_done:
            if is_chunked:
                self._downstream.write(LAST_CHUNK)
            self._complete(keep=not held.has_excess)

    # The client takes its time

    def pause(self) -> None:
        """Read no more from the upstream, whose time stands still meanwhile."""
        if self._connection is not None:
            self._connection.transport.pause_reading()
            self.deadline = math.inf

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.transport.resume_reading()
            self.deadline = self._loop.time() + self._config.idle_seconds

    # Ends

    def time_is_up(self) -> None:
        """The deadline has passed."""
        if self._ends_if_whole():
            return
        if self._connection is None:
            error = UpstreamTimeout("The upstream did not accept a connection.")
            self._owner.attempt_failed(error, Ending.CONNECT_TIMEOUT)
        elif self.first_byte_at is None:
            self._owner.attempt_failed(UpstreamTimeout("The upstream did not begin to answer in time."), Ending.TIMEOUT)
        else:
            self._owner.attempt_failed(UpstreamTimeout("The upstream stopped answering."), Ending.TIMEOUT)

    def is_quiet(self, now: float) -> bool:
        """Whether the upstream, which fails its checks, has sent nothing here since it was taken out.

        It has `health_seconds` for it. A client that takes nothing makes no upstream quiet.
        """
        since = self.upstream.lost_since
        if since is None or self._connection is None or self.deadline == math.inf:
            return False
        return max(since, self._heard_at) + self._config.health_seconds <= now

    def upstream_is_lost(self) -> None:
        """Wait no longer for an upstream that is not well any more."""
        if self._ends_if_whole():
            return
        error = UpstreamTimeout("The upstream stopped answering, and it fails its health checks.")
        self._owner.attempt_failed(error, Ending.LOST)

    def _ends_if_whole(self) -> bool:
        """End a stream of which all has come but the end of its framing."""
        end = self._splice.end_if_whole() if self._splice is not None else None
        if end is None:
            return False
        if end:
            self._downstream.write(end)
        self._complete(keep=False)
        return True

    def leave(self, ending: Ending) -> None:
        """Be done with the upstream, which learns by the end of the connection if it was not done."""
        self.upstream.end(self._ticket, ending, self._loop.time())
        self.deadline = math.inf
        if self._dialing is not None:
            dialing, self._dialing = self._dialing, None
            dialing.cancel()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def _fail(self, text: str) -> None:
        self._owner.attempt_failed(UpstreamError(text), Ending.BROKEN)

    def _complete(self, *, keep: bool) -> None:
        assert self._head is not None
        connection, self._connection = self._connection, None
        if connection is not None:
            if keep and self._head.keeps_alive and connection.has_sent_all:
                self.upstream.pool.put_back(connection)
            else:
                connection.abort()
        self.upstream.end(self._ticket, ending_of(self._head.status), self._loop.time())
        self._owner.attempt_completed()

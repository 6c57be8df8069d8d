"""The fast path of a client's connection: requests for other servers' models are read, forwarded and answered here.

aiohttp sees none of their bytes, which is what makes them cheap. Everything else is passed on to it: requests for
anything but a model of an upstream, and all that is odd or to be refused: the words for that stand in one place.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Mapping

from brlite.config.options import LimitsConfig
from brlite.errors import InvalidRequest, RequestError
from brlite.http.access_log import log_line
from brlite.http.access_log import logger as access_logger
from brlite.http.api_key import ApiKey
from brlite.http.body_budget import BodyBudget, HeldBody
from brlite.http.connection import Connection
from brlite.http.cors import Cors
from brlite.http.errors import OWN_HEADERS, error_body, error_headers, status_of
from brlite.http.keys import ApiKeys
from brlite.http.origin_policy import OriginPolicy
from brlite.http.request_id import RequestIds, client_request_id
from brlite.proxy.downstream import reset
from brlite.proxy.exchange import Exchange, ForwardedRequest
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.request_model import RequestModel, peek
from brlite.proxy.routing.route_table import Route
from brlite.proxy.wire.framing import Body, FramingError, LengthBody, body_of
from brlite.proxy.wire.heads import (
    END_OF_HEAD,
    Heads,
    RequestHead,
    num_whole_lines_bytes,
    read_request,
    status_line,
    text,
    without_limits,
)

PIPELINED_BYTES = 64 * 1024  # how much of the requests behind the one in progress is read
NO_CONTENT = 204  # its answers must not say a length
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
OWN_LINES = "".join(f"{name}: {value}\r\n" for name, value in OWN_HEADERS.items()).encode()


class FastPaths:
    """What the fast paths of a server's connections share. Calling it makes one, as long as there are upstreams."""

    def __init__(
        self,
        forwarder: Forwarder,
        keys: ApiKeys,
        limits: LimitsConfig,
        *,
        bodies: BodyBudget,
        policy: OriginPolicy,
        access_log: bool,
    ) -> None:
        self.forwarder = forwarder
        self.keys = keys
        self.limits = limits
        self.bodies = bodies
        self.heads = Heads(read_request)
        self.ids = RequestIds()
        self.policy = policy
        self.cors = Cors(policy) if policy.allowed_origins else None
        self.access_log = access_log

    def __call__(self, connection: Connection, transport: asyncio.Transport) -> FastPath | None:
        return FastPath(self, connection, transport) if self.forwarder.table.upstreams else None


class _Where(enum.Enum):
    HERE = enum.auto()
    ELSEWHERE = enum.auto()  # aiohttp has one request, of which it was given all
    ELSEWHERE_FOR_GOOD = enum.auto()  # where its request ends is aiohttp's to find out


class FastPath:
    """One connection's fast path, and the downstream of its exchanges, of which there is one at a time."""

    __slots__ = (
        "_body",
        "_client_id",
        "_connection",
        "_exchange",
        "_head",
        "_held",
        "_is_paused",
        "_is_reading",
        "_keeps_alive",
        "_key",
        "_num_checked",
        "_num_payload_bytes",
        "_num_raw_bytes",
        "_payload",
        "_raw",
        "_request_id",
        "_shared",
        "_started_at",
        "_status",
        "_transport",
        "_unread",
        "_where",
        "takes_chunks",
    )

    def __init__(self, shared: FastPaths, connection: Connection, transport: asyncio.Transport) -> None:
        self._shared = shared
        self._connection = connection
        self._transport = transport
        self._where = _Where.HERE
        self._unread = b""  # what came and belongs to no request yet
        self._num_checked = 0  # of it, the bytes of whole lines that may begin a head
        self._is_reading = True
        self._is_paused = False  # the client does not take what it is sent
        self._head: RequestHead | None = None
        self._body: Body | None = None
        self._held: HeldBody | None = None  # what the request takes of the budget of bodies
        self._raw: list[bytes] = []  # the request as it came, as long as its body is not complete
        self._payload: list[bytes] = []
        self._num_payload_bytes = self._num_raw_bytes = 0
        self._key: ApiKey | None = None
        self._exchange: Exchange | None = None
        self._keeps_alive = True
        self._request_id = ""
        self._client_id: str | None = None
        self._started_at = 0.0
        self._status = 0
        self.takes_chunks = True

    # The request

    def data_received(self, data: bytes) -> None:
        if self._where is _Where.ELSEWHERE_FOR_GOOD:
            self._connection.pass_on(data)
        elif self._exchange is not None or self._where is _Where.ELSEWHERE or self._is_paused:
            self._unread += data
            if len(self._unread) > PIPELINED_BYTES and self._is_reading:
                self._is_reading = False
                self._transport.pause_reading()
        elif self._body is not None:
            self._read_body(self._body, data)
        else:
            self._read_head(self._unread + data if self._unread else data)

    def request_ended(self) -> None:
        self._where = _Where.HERE if self._where is _Where.ELSEWHERE else self._where
        self._go_on_soon()

    def _read_head(self, data: bytes) -> None:
        self._unread = b""
        end = data.find(END_OF_HEAD) + len(END_OF_HEAD)
        max_bytes = self._shared.limits.max_header_bytes
        if end < len(END_OF_HEAD):
            num_checked = num_whole_lines_bytes(data, self._num_checked)
            if num_checked is None or len(data) > max_bytes:
                self._pass_on_for_good(data)  # at once: aiohttp answers a client that speaks TLS, or waits for more
            else:
                self._connection.bytes_came()
                self._unread, self._num_checked = data, num_checked
            return
        self._num_checked = 0
        if end > max_bytes:
            self._pass_on_for_good(data)
            return
        head, length = self._shared.heads.read(data[:end])
        if head is None or b"upgrade" in head.fields or self._shared.policy.refusal(*head.asked_by) is not None:
            self._pass_on_for_good(data)
        elif head.is_for_json and self._is_key_known(head):
            self._read_first_of_body(head, length, data, end)
        elif length is not None or b"transfer-encoding" in head.fields:
            self._pass_on_for_good(data)
        else:
            self._unread = data[end:]
            self._pass_on(data[:end])

    def _is_key_known(self, head: RequestHead) -> bool:
        """Whether it is; who shows none that is accepted is refused by aiohttp's middlewares."""
        self._key = self._shared.keys.find(head.shown_key)
        return self._key is not None

    def _read_first_of_body(self, head: RequestHead, length: int | None, data: bytes, begin: int) -> None:
        assert self._key is not None
        held = self._held = HeldBody(self._shared.bodies, self._key)
        if length is not None and b"transfer-encoding" not in head.fields:
            end = begin + length
            if len(data) == end and length <= self._shared.limits.max_body_bytes:  # as it mostly is: all in one piece
                if held.take(length) is None:
                    self._take(head, data[begin:], [data])
                else:
                    self._pass_on(data)
                return
        body = self._body_of(head, length)
        if body is None or held.arrive(time.monotonic()) is not None:
            self._pass_on_for_good(data)
            return
        if b"expect" in head.fields and len(data) == begin and not head.is_http_1_0:
            self._transport.write(CONTINUE)
        self._connection.bytes_came()
        self._connection.body_began()
        self._head, self._body, self._raw = head, body, [data[:begin]]
        self._read_body(body, data[begin:])

    def _body_of(self, head: RequestHead, length: int | None) -> Body | None:
        """The body that is to come, if it is not too long; None where aiohttp should have a word."""
        if head.is_http_1_0 and b"transfer-encoding" in head.fields:
            return None
        if length is not None and length > self._shared.limits.max_body_bytes:
            return None
        try:
            return body_of(head.fields, length, without=LengthBody(0))
        except FramingError:
            return None

    def _read_body(self, body: Body, data: bytes) -> None:
        self._raw.append(data)
        self._num_raw_bytes += len(data)
        if self._held is not None and self._held.take(len(data)) is not None:
            self._pass_on_for_good(b"".join(self._raw))
            return
        try:
            payload = body.feed(data)
        except FramingError:
            self._pass_on_for_good(b"".join(self._raw))
            return
        self._payload.append(payload)
        self._num_payload_bytes += len(payload)
        max_bytes = self._shared.limits.max_body_bytes
        if self._num_payload_bytes > max_bytes or self._num_raw_bytes > 2 * max_bytes + PIPELINED_BYTES:
            self._pass_on_for_good(b"".join(self._raw))
        elif body.is_done:
            assert self._head is not None
            if body.excess:
                self._unread = body.excess
                self._raw[-1] = data[: len(data) - len(body.excess)]
            self._take(self._head, b"".join(self._payload), self._raw)

    def _take(self, head: RequestHead, body: bytes, raw: list[bytes]) -> None:
        """The request is all there: forward it if its model is an upstream's, else pass it on as it came."""
        self._forget_parts()
        if self._held is not None:
            self._held.arrived()
        try:
            seen = peek(body)
        except InvalidRequest:
            self._pass_on(b"".join(raw))
            return
        target = self._shared.forwarder.table.find(seen.model)
        assert self._key is not None
        if target is None or not self._key.may_use(target.model):
            self._pass_on(b"".join(raw))
        else:
            self._forward(head, body, seen, target, self._key)

    def _forward(self, head: RequestHead, body: bytes, seen: RequestModel, target: Route, key: ApiKey) -> None:
        forwarder = self._shared.forwarder
        self._connection.request_began()
        self._head, self._started_at, self._status = head, time.perf_counter(), 0
        self._request_id = self._shared.ids.new()
        sent_id = head.fields.get(b"x-request-id")
        self._client_id = None if sent_id is None else client_request_id(text(sent_id))
        self._keeps_alive = head.keeps_alive
        self.takes_chunks = not head.is_http_1_0
        try:
            forwarder.check_hops(head.via)
            lines = head.lines_for_upstreams(
                self._client_id or self._request_id, forwarder.via, forwarder.request_headers
            )
            lines += forwarder.client_lines(self._peer, head.fields)
            affinity = forwarder.affinity(body, seen, head.fields)
            request = ForwardedRequest(head.target, lines, body, seen.model, key, affinity)
            self._exchange = forwarder.forward(request, target, self)
        except RequestError as error:
            self.refuse(error)
            self.ended()
            return
        self._exchange.start()

    # aiohttp's requests

    def _pass_on(self, request: bytes) -> None:
        """Give aiohttp one whole request; what follows waits until it is answered."""
        self._forget_request()
        self._where = _Where.ELSEWHERE
        self._connection.pass_on(request)

    def _pass_on_for_good(self, data: bytes) -> None:
        self._forget_request()
        self._where = _Where.ELSEWHERE_FOR_GOOD
        self._connection.pass_on(data)

    def _forget_request(self) -> None:
        """It is aiohttp's now, or over: what is held for it here is released."""
        if self._held is not None:
            self._held.release()
            self._held = None
        self._forget_parts()

    def _forget_parts(self) -> None:
        self._head = self._body = None
        self._raw, self._payload = [], []
        self._num_payload_bytes = self._num_raw_bytes = 0

    # The answer

    def begin(self, status: int, lines: bytes, length: int | None) -> None:
        if length is not None:
            framing = b"Content-Length: %d\r\n" % length
        elif self.takes_chunks:
            framing = b"Transfer-Encoding: chunked\r\n"
        else:
            framing, self._keeps_alive = b"", False
        self._write_head(status, lines + framing, b"")

    def write(self, data: bytes) -> None:
        # uvloop raises, and asyncio warns, on a write after close.
        if not self._transport.is_closing():
            self._transport.write(data)

    def answer(self, status: int, lines: bytes, body: bytes) -> None:
        framing = b"Content-Length: %d\r\n" % len(body) if status != NO_CONTENT else b""
        self._write_head(status, lines + framing, body)

    def refuse(self, error: RequestError) -> None:
        body = error_body(error)
        headers = {"Content-Type": "application/json; charset=utf-8", **error_headers(error)}
        self.answer(status_of(error).http, _lines(headers), body)

    def cut(self) -> None:
        reset(self._transport)

    def ended(self) -> None:
        self._log()
        self._forget_request()
        self._exchange = self._key = None
        if not self._keeps_alive or self._connection.is_draining:
            self._transport.close()
            return
        self._connection.request_ended()
        self._go_on_soon()

    def _write_head(self, status: int, lines: bytes, body: bytes) -> None:
        self._status = status
        if self._connection.is_draining:
            self._keeps_alive = False
        own = b"%bX-Request-Id: %b\r\n" % (OWN_LINES, (self._client_id or self._request_id).encode())
        if not self._keeps_alive:
            own += b"Connection: close\r\n"
        elif not self.takes_chunks:
            own += b"Connection: keep-alive\r\n"  # HTTP/1.0 clients want to be told
        if self._key is not None and self._key.has_limits:
            lines = without_limits(lines)
            own += _lines(self._key.headers(time.monotonic()))
        if self._shared.cors is not None and self._head is not None:
            own += _lines(self._shared.cors.headers(text(self._head.fields.get(b"origin"))))
        self.write(b"%b%b%b\r\n%b" % (status_line(status), lines, own, body))

    def _go_on_soon(self) -> None:
        """Take the next request, if it came already, when whoever ended the last one is done."""
        if self._unread or not self._is_reading:
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._exchange is not None or self._where is _Where.ELSEWHERE or self._is_paused:
            return
        if self._transport.is_closing():
            return
        if not self._is_reading:
            self._is_reading = True
            self._transport.resume_reading()
        if self._unread:
            data, self._unread = self._unread, b""
            self.data_received(data)

    # The connection

    def pause_writing(self) -> None:
        self._is_paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        else:
            self._go_on_soon()

    def connection_lost(self) -> None:
        if self._exchange is not None:
            self._exchange.client_left()
        self._forget_request()

    @property
    def _peer(self) -> str | None:
        """The client's address."""
        peer = self._transport.get_extra_info("peername")
        return str(peer[0]) if isinstance(peer, tuple) else None

    def _log(self) -> None:
        exchange, head = self._exchange, self._head
        if head is None or not self._shared.access_log or not access_logger.isEnabledFor(logging.INFO):
            return
        extras: dict[str, object] = {}
        if exchange is not None:
            extras.update(exchange.log_fields())
        if self._key is not None and self._key.name:
            extras["key"] = self._key.name
        if self._client_id is not None:
            extras["client_id"] = self._client_id
        status = exchange.status if exchange is not None else self._status
        milliseconds = (time.perf_counter() - self._started_at) * 1000
        path = head.target.decode("latin-1")
        log_line(self._peer, head.method.decode(), path, status, milliseconds, self._request_id, extras)


def _lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")

"""The proxy within aiohttp: a middleware that forwards requests.

For applications that are mounted in another one, which have no fast path, and for requests that a fast path has given
to aiohttp.
"""

from __future__ import annotations

import asyncio
import re

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler, Middleware

from brlite.config.options import LimitsConfig
from brlite.errors import ModelNotFound, RequestError
from brlite.http.access_log import log_extras
from brlite.http.body import keep_body, read_body
from brlite.http.keys import API_KEY
from brlite.http.request_id import shown_request_id
from brlite.proxy.exchange import Exchange
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.request_model import Inbound, read_inbound
from brlite.proxy.routing.route_table import Route, RouteTable
from brlite.proxy.wire.connections import reset
from brlite.proxy.wire.heads import FORWARDED_PATHS, RequestHead, is_forwardable, usual_spelling, without_limits

# The raw path, after the path that this application is mounted at.
_BARE_PATHS = "|".join(re.escape(path.decode()) for path in sorted(FORWARDED_PATHS) if not path.startswith(b"/v1/"))
_TARGET = re.compile(rf"[!->@-~]*?(/v1/[!-~]+|(?:{_BARE_PATHS})(?:\?[!-~]*)?)")
STORED_RESPONSES = b"/v1/responses/"
FORWARDED_METHODS = ("POST", "GET", "HEAD", "DELETE")
BACKLOG_BYTES = 64 * 1024


def forward_middleware(forwarder: Forwarder, limits: LimitsConfig, *, is_only_proxy: bool) -> Middleware:
    """A middleware that forwards POST requests for an upstream's model, and requests about responses stored there.

    The handler gets all other requests; a body that was read is kept for it.
    """

    @web.middleware
    async def forward(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method not in FORWARDED_METHODS or not forwarder.table.upstreams:
            return await handler(request)
        wire_path = _wire_path(request)
        if request.method != "POST" or not is_forwardable(wire_path):
            if not wire_path.startswith(STORED_RESPONSES):
                return await handler(request)
            head = _head_of(request, wire_path)
            found = forwarder.find_stored(head, request[API_KEY])
            if found is None:
                return await handler(request)
            has_body = request.method == "POST" and request.body_exists  # a cancel has none, whatever type it names
            body = await read_body(request, limits) if has_body else b""
            return await run(request, Inbound(head, body, request[API_KEY], None, None), found)
        body = await read_body(request, limits)
        inbound = read_inbound(_head_of(request, wire_path), body, request[API_KEY])
        route = forwarder.table.find(inbound.model)
        if route is None:
            if is_only_proxy:
                raise _unknown_model(inbound, forwarder.table)
            keep_body(request, body)
            return await handler(request)
        return await run(request, inbound, route)

    async def run(request: web.Request, inbound: Inbound, route: Route) -> web.StreamResponse:
        downstream = ResponseDownstream(request)
        exchange = forwarder.forward(inbound, route, downstream)
        try:
            await forwarder.settle(inbound)
            return await downstream.respond(exchange)
        finally:
            exchange.client_left()  # no effect after a complete response
            log_extras(request).update(exchange.log_fields())

    return forward


def _unknown_model(inbound: Inbound, table: RouteTable) -> ModelNotFound:
    """The error for a model that no upstream has. It names the models that the key may use, or raises `Forbidden`."""
    inbound.key.check_model(inbound.model or "")
    known = ", ".join(name for name, route in table.names() if inbound.key.may_use(route.model))
    text = f"say which model: {known}"
    if inbound.model is not None:
        text = f"The model `{inbound.model[:200]}` does not exist. Served here: {known or 'none that this key may use'}"
    return ModelNotFound(text, param="model", code="model_not_found")


class ResponseDownstream:
    """The downstream of an exchange in aiohttp: buffers the response until `respond` has sent it."""

    takes_chunks = False  # aiohttp frames the body

    def __init__(self, request: web.Request) -> None:
        self.request_id = shown_request_id(request)
        self.peer = request.remote
        self._request = request
        self._response: web.StreamResponse | None = None
        self._parts: list[bytes] = []
        self._num_waiting = 0
        self._exchange: Exchange | None = None
        self._error: RequestError | None = None
        self._is_cut = self._is_over = False
        self._changed = asyncio.Event()

    async def respond(self, exchange: Exchange) -> web.StreamResponse:
        """Run the exchange and send its response. Raises its error if the request was refused."""
        self._exchange = exchange
        exchange.start()
        while self._response is None and not self._is_over:
            await self._wait()
        if self._error is not None:
            raise self._error
        response = self._response
        assert response is not None
        if isinstance(response, web.Response):
            return response
        await response.prepare(self._request)
        while self._parts or not self._is_over:
            data, self._parts, self._num_waiting = b"".join(self._parts), [], 0
            if data:
                await response.write(data)
                exchange.resume()
            else:
                await self._wait()
        if self._is_cut:
            response.force_close()
            if self._request.transport is not None:
                reset(self._request.transport)
            return response
        await response.write_eof()
        return response

    def begin(self, status: int, lines: bytes, length: int | None) -> None:
        response = web.StreamResponse(status=status, headers=self._headers(lines))
        if length is not None:
            response.content_length = length
        elif self._request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        else:
            response.force_close()
        self._response = response
        self._changed.set()

    def write(self, data: bytes) -> None:
        if not data or self._request.method == hdrs.METH_HEAD:
            return  # with an empty part `respond` would wait for more, even after the end
        self._parts.append(data)
        self._num_waiting += len(data)
        if self._num_waiting > BACKLOG_BYTES and self._exchange is not None:
            self._exchange.pause()
        self._changed.set()

    def answer(self, status: int, lines: bytes, body: bytes) -> None:
        self._response = web.Response(status=status, headers=self._headers(lines), body=body)

    def refuse(self, error: RequestError) -> None:
        self._error = error

    def cut(self) -> None:
        self._is_cut = True

    def ended(self) -> None:
        self._is_over = True
        self._changed.set()

    def _headers(self, lines: bytes) -> list[tuple[str, str]]:
        has_limits = self._request[API_KEY].has_limits
        return _pairs(without_limits(lines) if has_limits else lines)

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()


def _wire_path(request: web.Request) -> bytes:
    """The path below the mount point, with the query. b"" if the path cannot be forwarded."""
    is_mounted = len(request.match_info.apps) > 1
    path = request.rel_url.raw_path_qs
    found = _TARGET.fullmatch(path if is_mounted else usual_spelling(path.encode()).decode())
    if found is None or (found.start(1) > 0 and not is_mounted):
        return b""
    return found[1].encode()


def _head_of(request: web.Request, wire_path: bytes) -> RequestHead:
    """The request's head as a fast path would have read it, with the path to send to upstreams.

    A HEAD becomes a GET: its answer has the same headers, and aiohttp leaves out the body.
    """
    fields: dict[bytes, bytes] = {}
    for name, value in request.raw_headers:
        key = name.lower()
        fields[key] = fields[key] + b", " + value if key in fields else value
    lines = b"".join(b"%b: %b\r\n" % header for header in request.raw_headers)
    is_http_1_0 = request.version < HttpVersion11
    method = b"GET" if request.method == hdrs.METH_HEAD else request.method.encode()
    return RequestHead(method, wire_path, fields, lines, is_http_1_0=is_http_1_0)


def _pairs(lines: bytes) -> list[tuple[str, str]]:
    pairs = (line.partition(b":") for line in lines.split(b"\r\n") if line)
    return [(name.decode("latin-1"), value.strip().decode("latin-1")) for name, _, value in pairs]

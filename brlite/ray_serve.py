"""brlite on Ray Serve, on several machines: `serve run brlite.ray_serve:build config=brlite.toml`.

Ray places replicas, counts their requests, scales them and replaces dead ones. Each replica runs a complete brlite
server on a loopback port of its machine, so API, errors, keys and limits are those of `brlite serve`. This file
forwards requests and responses without reading them. `proxy_middlewares` converts errors of Serve's own HTTP proxy to
brlite's format.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from ray import serve
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from yarl import URL

from brlite.app import create_app
from brlite.config.load import load_config
from brlite.config.options import Config, Count, CountOrZero, Text
from brlite.config.validation import convert, make_config
from brlite.config.warnings import check_supported, config_warnings
from brlite.dialects.openai_answer import encode_error
from brlite.errors import (
    BrliteError,
    ConfigError,
    EngineError,
    NotFound,
    NotReady,
    QueueFull,
    RequestTimeout,
    UpstreamError,
)
from brlite.http.errors import error_body, error_headers, status_of
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine

logger = logging.getLogger(__name__)

NAME = "brlite"  # of the deployment; a Serve config overrides its options by this name
LOOPBACK = "127.0.0.1"
CLOSING_SECONDS = 5  # time for a replica to close after the grace period of its requests
# Hop-by-hop headers. Serve's HTTP proxy also handles `expect`, and sets the last three itself.
NOT_ASKED = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect"})
NOT_ANSWERED = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server", b"x-request-id"})
MAX_TEXT = 2000
MAX_EVENT_BYTES = 2**20  # a longer event is forwarded before it is complete
CUT_STREAM = "the replica that computed this stream is gone"


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of `build`. `config` is a file on the machine that runs `build`, or its content as a table."""

    config: Text | dict[str, Any] = {}
    min_replicas: CountOrZero = 1
    max_replicas: Count = 1


def build(arguments: Mapping[str, object]) -> serve.Application:
    """The application that `serve run` and Serve configs start. Raises `ConfigError` before anything is started.

    One more replica is started for each full batch that runs or waits. Settings of the deployment `brlite` in a Serve
    config override those made here. `server.host` and `server.port` are not used: Serve listens.
    """
    given = convert(arguments, Arguments, source="arguments", is_text=True)
    if given.min_replicas > given.max_replicas:
        raise ConfigError(f"arguments: min_replicas = {given.min_replicas}: allowed is max_replicas at most")
    config = _read_config(given.config)
    for line in config_warnings(config):
        logger.warning("%s", line)
    deployment = serve.deployment(Replica).options(
        name=NAME,
        autoscaling_config={
            "min_replicas": given.min_replicas,
            "max_replicas": given.max_replicas,
            "target_ongoing_requests": config.model[0].build_batch,
        },
        # An overloaded replica refuses requests itself, with Retry-After; Serve queues them only while no replica runs.
        max_ongoing_requests=config.limits.max_connections,
        max_queued_requests=config.limits.max_waiting,
        graceful_shutdown_timeout_s=config.server.drain_seconds + CLOSING_SECONDS,
        ray_actor_options={"num_cpus": config.engine.threads or 1},
        # threads = 0 takes all cores: one replica is enough for a machine.
        max_replicas_per_node=None if config.engine.threads else 1,
    )
    return deployment.bind(msgspec.to_builtins(config))


class Replica:
    """One server in a Ray process. It ends with the process, after its last request."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = make_config(config, source="config")
        self._opened = AsyncExitStack()
        # Serve calls this on the serving event loop. It sends requests only after a health check has passed.
        self._started = asyncio.ensure_future(self._start())

    async def check_health(self) -> None:
        """Serve calls this at the start and then every few seconds. It waits until the model is loaded.

        If it raises, Serve replaces this replica.
        """
        await asyncio.shield(self._started)
        async with self._session.get(self._url / "health") as answer:
            if answer.status != 200:
                raise EngineError("the engine has died")

    async def __call__(self, request: Request) -> Response:
        """Forward a request to the server, and stream its response back."""
        headers, query = request.headers, request.url.query
        path = request.scope["path"].removeprefix(request.scope["root_path"])  # the application's route prefix
        try:
            answer = await self._session.request(
                request.method,
                URL(f"{self._url.with_path(path)}{query and '?'}{query}", encoded=True),
                headers=[(name, value) for name, value in headers.items() if name not in NOT_ASKED],
                data=request.stream() if "content-length" in headers or "transfer-encoding" in headers else None,
                allow_redirects=False,
            )
        except aiohttp.ClientError as failure:  # the server has stopped, or accepts no more connections
            error = NotReady(f"this replica's server does not answer: {type(failure).__name__}", retry_after_seconds=1)
            return Response(
                error_body(error, request.url.path), status_of(error).http, error_headers(error), "application/json"
            )
        response = StreamingResponse(_parts(answer), answer.status)
        headers_sent = ((name.lower(), value) for name, value in answer.raw_headers)  # ASGI requires lower case
        response.raw_headers = [(name, value) for name, value in headers_sent if name not in NOT_ANSWERED]
        return response

    async def _start(self) -> None:
        config = self._config
        async with AsyncExitStack() as opened:
            engine = await opened.enter_async_context(AsyncEngine.from_config(config))
            app = await asyncio.to_thread(create_app, engine, config)  # it reads the key file
            server = HttpServer(app, LOOPBACK, 0, config.limits, config.server.drain_seconds)
            await opened.enter_async_context(server)
            self._url = URL(server.url)
            self._session = await opened.enter_async_context(_session(config))
            self._opened = opened.pop_all()


def _session(config: Config) -> aiohttp.ClientSession:
    """A client that adds no headers, and limits neither the number of concurrent requests nor their time."""
    return aiohttp.ClientSession(
        # Close idle connections before the server does: a request must not be sent on a closing connection.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=config.limits.keepalive_seconds / 2),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


async def _parts(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Stream the body. If the client disconnects, the connection is closed, which ends the request."""
    async with answer:
        async for part in answer.content.iter_any():
            yield part


def _read_config(source: str | dict[str, Any]) -> Config:
    config = load_config(Path(source)) if isinstance(source, str) else make_config(source, source="config")
    check_supported(config)
    if len(config.model) != 1 or config.upstream:
        raise ConfigError(
            "a Ray Serve application serves one model: start one for each, and `brlite proxy` in front of them"
        )
    if config.model[0].load != "start":
        raise ConfigError('model[0].load = "on_demand": allowed is start; min_replicas = 0 has the same effect')
    return config


def proxy_middlewares() -> list[Middleware]:
    """The middlewares for Serve's HTTP proxies, which Serve installs with the environment variable
    `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=brlite.ray_serve:proxy_middlewares`.
    """
    return [Middleware(ErrorEnvelope)]


class ErrorEnvelope:
    """An ASGI middleware that converts errors of Serve's own HTTP proxy to brlite's JSON format.

    If no replica answers, Serve sends plain text (404, 408, 503). If a replica dies, Serve sends no response or cuts
    the stream. The middleware gets the responses of all applications of a cluster, and changes only plain-text errors
    and incomplete event streams.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _ServeResponse(scope, send)
        await self._app(scope, receive, answer.send)
        await answer.end()


class _ServeResponse:
    """Forwards the response to one request, with its errors converted."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._is_begun = False
        self._is_whole = False
        self._is_stream = False
        self._unfinished = b""  # the incomplete event at the end of a stream
        self._refusal: Message | None = None  # the head of Serve's plain-text error, held until its body is complete
        self._text = b""

    async def send(self, message: Message) -> None:
        """Forward an ASGI message of the application, but buffer plain-text errors and incomplete events."""
        if message["type"] == "http.response.start":
            self._is_begun = True
            headers = {name.lower(): value for name, value in message["headers"]}
            kind = headers.get(b"content-type", b"").partition(b";")[0]
            self._is_stream = kind == b"text/event-stream"
            if kind == b"text/plain" and message["status"] in (404, 408, 429, 500, 503):
                self._refusal = message
            else:
                await self._send(message)
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._is_whole = not message.get("more_body", False)
        body = message.get("body", b"")
        if self._refusal is not None:
            self._text += body[: MAX_TEXT - len(self._text)]
            if self._is_whole:
                await self._send_error(self._error(self._refusal["status"]), self._refusal)
        elif self._is_stream and not self._is_whole:
            body = self._unfinished + body
            length = body.rfind(b"\n\n") + 2 if b"\n\n" in body else 0
            if len(body) - length > MAX_EVENT_BYTES:
                length = len(body)
            self._unfinished = body[length:]
            if length:
                await self._send({**message, "body": body[:length]})
        else:
            await self._send({**message, "body": self._unfinished + body})

    async def end(self) -> None:
        """Call it when the application has returned. Sends an error if there was no response; ends an open stream."""
        if self._is_whole:
            return
        if not self._is_begun:
            await self._send_error(EngineError("no replica answered"))
        elif self._refusal is not None:
            await self._send_error(self._error(self._refusal["status"]), self._refusal)
        elif self._is_stream:
            event = encode_error(UpstreamError(CUT_STREAM))
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    def _error(self, status: int) -> BrliteError:
        text = self._text.decode(errors="replace")
        if status == 404:
            return NotFound(f"unknown endpoint: {self._scope['method']} {self._scope['path'][:200]}")
        if status == 408:
            return RequestTimeout(text)
        if status == 429:
            return QueueFull(text)
        return NotReady(text) if status == 503 else EngineError(text)

    async def _send_error(self, error: BrliteError, refusal: Message | None = None) -> None:
        body = error_body(error, self._scope["path"])
        own = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
        kept = [header for header in (refusal["headers"] if refusal else ()) if header[0].decode().lower() not in own]
        headers = [(name.encode(), value.encode()) for name, value in own.items()]
        await self._send({"type": "http.response.start", "status": status_of(error).http, "headers": [*headers, *kept]})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

"""Gives the errors of Ray Serve's own HTTP proxy brlite's envelope, by a middleware that Serve puts into that proxy.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=brlite.ray_errors:proxy_middlewares` installs it. Serve answers in plain text
where no replica does (404, 408, 503), not at all where a replica dies before its response, and cuts a stream where it
dies later. The middleware sees the responses of all applications of a cluster; it changes plain-text errors and
unfinished event streams only.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brlite import errors
from brlite.http.errors import error_body, error_headers, status_of

MAX_TEXT = 2000
MAX_EVENT_BYTES = 2**20  # a longer unfinished event is passed on as it comes
CUT_STREAM = "the replica that computed this stream is gone"


def proxy_middlewares() -> list[Middleware]:
    """The middlewares that Serve asks for in each of its HTTP proxies."""
    return [Middleware(ErrorEnvelope)]


class ErrorEnvelope:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        await self._app(scope, receive, answer.send)
        await answer.end()


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._is_begun = False
        self._is_whole = False
        self._is_stream = False
        self._unfinished = b""  # of a stream: an event that has not come to its end
        self._refusal: Message | None = None  # the head of an answer of Serve's own, held until its text is there
        self._text = b""

    async def send(self, message: Message) -> None:
        """What the application sends."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            self._is_whole = not message.get("more_body", False)
            await self._go_on(message)
        else:
            await self._send(message)

    async def end(self) -> None:
        """The application has returned: answer what it left unanswered, and end a stream that it left open."""
        if self._is_whole:
            return
        if not self._is_begun:
            await self._send_error(errors.EngineError("no replica answered"))
        elif self._refusal is not None:
            await self._send_error(self._error(self._refusal["status"]), self._refusal)
        elif self._is_stream:
            event = b"data: %b\n\ndata: [DONE]\n\n" % error_body(errors.UpstreamError(CUT_STREAM))
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _begin(self, message: Message) -> None:
        self._is_begun = True
        headers = {name.lower(): value for name, value in message["headers"]}
        kind = headers.get(b"content-type", b"").partition(b";")[0]
        self._is_stream = kind == b"text/event-stream"
        if kind == b"text/plain" and message["status"] in (404, 408, 429, 500, 503):
            self._refusal = message
        else:
            await self._send(message)

    async def _go_on(self, message: Message) -> None:
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

    def _error(self, status: int) -> errors.BrliteError:
        text = self._text.decode(errors="replace")
        if status == 404:
            return errors.NotFound(f"Invalid URL ({self._scope['method']} {self._scope['path'][:200]})")
        if status == 408:
            return errors.RequestTimeout(text)
        if status == 429:
            return errors.QueueFull(text)
        return errors.NotReady(text) if status == 503 else errors.EngineError(text)

    async def _send_error(self, error: errors.BrliteError, refusal: Message | None = None) -> None:
        body = error_body(error)
        own = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
        kept = [header for header in (refusal["headers"] if refusal else ()) if header[0].decode().lower() not in own]
        headers = [(name.encode(), value.encode()) for name, value in own.items()]
        await self._send({"type": "http.response.start", "status": status_of(error).http, "headers": [*headers, *kept]})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

"""Errors as HTTP: the status, headers and body for each exception, aiohttp's included.

The bodies, and the status of each of our own errors, are in `dialects/errors.py`. `middlewares.py` decides when such a
response is sent.
"""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import web

import brlite.dialects.errors as dialect_errors
from brlite import errors
from brlite.dialects.errors import SERVER_FAULT, STATUSES, Status, envelope

CLIENT_LEFT = 499  # nginx's status for "client closed request"; only in the log
# On every response. Without our `Server` header, aiohttp would send its version and Python's.
OWN_HEADERS = {"Server": "brlite", "X-Content-Type-Options": "nosniff"}


def status_of(error: BaseException) -> Status:
    """The error's status, type and code."""
    if isinstance(error, web.HTTPException):
        return Status(error.status, "server_error" if error.status >= 500 else "invalid_request_error", None)
    return dialect_errors.status_of(error)


def error_body(error: BaseException, path: str = "", request_id: str = "") -> bytes:
    """The error of a request to `path` as JSON. The text of an internal error is replaced by one fixed sentence."""
    if isinstance(error, web.HTTPException):
        message = error.reason if error.status < 500 else SERVER_FAULT
        return envelope(status_of(error), message, None, path, request_id)
    return dialect_errors.error_body(error, path, request_id)


def foreign_error_body(http: int, message: str, path: str) -> bytes:
    """The error body for a status and message of another server.

    The type is that of the status. The code is always `upstream_error`: our own codes name causes, and the other
    server's cause is unknown.
    """
    other = "invalid_request_error" if http < 500 else "server_error"
    kind = next((status.type for status in STATUSES.values() if status.http == http), other)
    return envelope(Status(http, kind, "upstream_error"), message, None, path)


def error_headers(error: BaseException) -> dict[str, str]:
    """The additional headers of some errors, such as `Retry-After`."""
    headers = {}
    if isinstance(error, errors.RequestError) and error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, errors.RequestTimeout):
        # Else SDKs retry every 408. A request that exceeded its own `timeout` would exceed it again.
        headers["X-Should-Retry"] = "false" if error.param else "true"
    if isinstance(error, errors.MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(error: BaseException, path: str = "", request_id: str = "") -> web.Response:
    """The error of a request to `path` as an aiohttp response."""
    return web.Response(
        status=status_of(error).http,
        body=error_body(error, path, request_id),
        content_type="application/json",
        headers={**OWN_HEADERS, **error_headers(error)},
    )


def error_bytes(error: BaseException) -> bytes:
    """The error as a whole HTTP/1.1 response with `Connection: close`, if there is no request object to answer."""
    status, body = HTTPStatus(status_of(error).http), error_body(error)
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **OWN_HEADERS,
        **error_headers(error),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{lines}\r\n".encode() + body

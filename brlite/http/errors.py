"""The error envelope: which HTTP status, type and code each exception has, and the JSON body that says so.

The body is OpenAI's nested object with the flat keys of the manual's era beside it, so old and new clients both find
their message. It knows no requests: `error_middleware.py` decides when an envelope is sent.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import NamedTuple

import msgspec
from aiohttp import web

from brlite import errors

SERVER_FAULT = "The server had an error while processing your request."
MAX_MESSAGE_LENGTH = 2000
# On every answer. `Server` is said because aiohttp would say its own version and Python's.
OWN_HEADERS = {"Server": "brlite", "X-Content-Type-Options": "nosniff"}


class Status(NamedTuple):
    """What HTTP and OpenAI call an error. An error's own `code` goes before this one."""

    http: int
    type: str
    code: str | None


STATUSES: dict[type[BaseException], Status] = {
    errors.RequestError: Status(400, "invalid_request_error", "invalid_value"),
    errors.PromptTooLong: Status(400, "invalid_request_error", "context_length_exceeded"),
    errors.Unauthorized: Status(401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: Status(403, "permission_error", "model_not_allowed"),
    errors.NotFound: Status(404, "not_found_error", "unknown_url"),
    errors.ModelNotFound: Status(404, "not_found_error", "model_not_found"),
    errors.MethodNotAllowed: Status(405, "invalid_request_error", "method_not_allowed"),
    errors.RequestTimeout: Status(408, "invalid_request_error", "request_timeout"),
    errors.BodyTooLarge: Status(413, "invalid_request_error", "request_too_large"),
    errors.UnsupportedMediaType: Status(415, "invalid_request_error", "unsupported_media_type"),
    errors.QueueFull: Status(429, "rate_limit_error", "queue_full"),
    errors.RateLimited: Status(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.QueueTimeout: Status(503, "server_error", "queue_timeout"),
    errors.NotReady: Status(503, "server_error", "not_ready"),
    errors.LoopDetected: Status(508, "server_error", "loop_detected"),
    errors.UpstreamError: Status(502, "server_error", "upstream_error"),
    errors.UpstreamUnavailable: Status(503, "server_error", "upstream_unavailable"),
    errors.UpstreamTimeout: Status(504, "server_error", "upstream_timeout"),
    BaseException: Status(500, "server_error", "internal_error"),
}


def status_of(error: BaseException) -> Status:
    """The table's row of the error's nearest class."""
    if isinstance(error, web.HTTPException):
        return Status(error.status, "server_error" if error.status >= 500 else "invalid_request_error", None)
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def error_body(error: BaseException) -> bytes:
    """The error as JSON. What is not the client's business is replaced by one fixed sentence."""
    status = status_of(error)
    code = getattr(error, "code", None) or status.code
    return _body(status._replace(code=code), _message(error), getattr(error, "param", None))


def foreign_error_body(http: int, message: str) -> bytes:
    """The body for a status that another server chose, with its words."""
    known = next((status for status in STATUSES.values() if status.http == http), None)
    kind = "invalid_request_error" if http < 500 else "server_error"
    return _body(known or Status(http, kind, "upstream_error"), message, None)


def _body(status: Status, message: str, param: str | None) -> bytes:
    fields = {"message": message, "type": status.type, "param": param, "code": status.code}
    return msgspec.json.encode({"error": fields, "object": "error", **fields, "code": status.http})


def error_headers(error: BaseException) -> dict[str, str]:
    """The headers that HTTP wants beside some errors."""
    headers = {}
    if isinstance(error, errors.RequestError) and error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, errors.MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(error: BaseException) -> web.Response:
    """The error as an aiohttp response."""
    return web.Response(
        status=status_of(error).http,
        body=error_body(error),
        content_type="application/json",
        headers={**OWN_HEADERS, **error_headers(error)},
    )


def error_bytes(error: BaseException) -> bytes:
    """The error as a whole HTTP/1.1 response that ends its connection, for when there is no request to answer."""
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


def _message(error: BaseException) -> str:
    if isinstance(error, errors.RequestError):
        text = str(error)
    elif isinstance(error, web.HTTPException) and error.status < 500:
        text = error.reason
    else:
        text = SERVER_FAULT
    # A path or a field of the client's may be echoed here, and hold what JSON cannot.
    return text[:MAX_MESSAGE_LENGTH].encode("utf-8", "backslashreplace").decode()

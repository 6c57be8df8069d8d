"""The error envelope: the HTTP status, type and code of each exception, and the JSON body.

The body has OpenAI's nested object and the manual's older flat keys, so that old and new clients both find the message.
Under /v1/messages it is Anthropic's. `http/errors.py` makes the responses.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from brlite import errors

SERVER_FAULT = "The server had an error while processing your request."
MAX_MESSAGE_LENGTH = 2000
MAX_PARAM_LENGTH = 200

# The paths of Anthropic's API, with or without a prefix that the application is mounted under.
_ANTHROPIC_PATH = re.compile(r"(?:.*/v1)?/+messages(?:[/?].*)?")
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Status(NamedTuple):
    """An error's HTTP status, and its type and code in OpenAI's API. The `code` of the exception overrides this one."""

    http: int
    type: str
    code: str | None


STATUSES: dict[type[BaseException], Status] = {
    errors.RequestError: Status(400, "invalid_request_error", "invalid_value"),
    errors.PromptTooLong: Status(400, "invalid_request_error", "context_length_exceeded"),
    errors.Unauthorized: Status(401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: Status(403, "permission_error", "model_not_allowed"),
    errors.OperatorKeyRequired: Status(403, "permission_error", "operator_key_required"),
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
    """The row of `STATUSES` for the error's class, or for its nearest base class."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def error_code(error: BaseException) -> str | None:
    """The error's own code, or that of its class."""
    return getattr(error, "code", None) or status_of(error).code


def error_message(error: BaseException) -> str:
    """The message for the client. Errors that the request did not cause give one fixed sentence."""
    return str(error)[:MAX_MESSAGE_LENGTH] if isinstance(error, errors.RequestError) else SERVER_FAULT


def is_anthropic(path: str) -> bool:
    """Whether requests to this path, and its errors, have Anthropic's shape."""
    return "messages" in path and _ANTHROPIC_PATH.fullmatch(path) is not None


def error_body(error: BaseException, path: str = "", request_id: str = "") -> bytes:
    """The error of a request to `path` as JSON. `request_id`, if given, is in Anthropic's shape only."""
    status = status_of(error)
    message = error_message(error)
    if isinstance(error, errors.PromptTooLong) and error.max_tokens and is_anthropic(path):
        # Agents match this text, and then shorten their history.
        message = f"prompt is too long: {error.num_tokens} tokens > {error.max_tokens} maximum"
    status = status._replace(code=error_code(error))
    param = getattr(error, "param", None)
    return envelope(status, message, param and param[:MAX_PARAM_LENGTH], path, request_id)


def envelope(status: Status, message: str, param: str | None, path: str, request_id: str = "") -> bytes:
    """The JSON body. Lone surrogates in `message`, from the client's path or field, are escaped: JSON has none."""
    message = message.encode("utf-8", "backslashreplace").decode()
    fields: dict[str, Any]
    if is_anthropic(path):
        other = "invalid_request_error" if status.http < 500 else "api_error"
        fields = {"type": ANTHROPIC_TYPES.get(status.http, other), "message": message}
        if param:
            fields["param"] = param
        if status.code:
            fields["details"] = {"error_code": status.code}  # Anthropic's SDKs check some of its codes
        named = {"request_id": request_id} if request_id else {}
        return msgspec.json.encode({"type": "error", "error": fields, **named})
    fields = {"message": message, "type": status.type, "param": param, "code": status.code}
    return msgspec.json.encode({"error": fields, "object": "error", **fields, "code": status.http})

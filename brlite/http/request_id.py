"""The name of a request in logs and answers: the client's `X-Request-Id` if it is harmless, else one of our own.

It knows nothing of what is asked.
"""

from __future__ import annotations

import re
import secrets

from aiohttp import web

HEADER = "X-Request-Id"

_SAFE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_KEY = web.RequestKey("request_id", str)


def new_request_id() -> str:
    """An id that nobody guesses and no other request has."""
    return secrets.token_hex(16)


def choose_request_id(sent: str | None) -> str:
    """The id that a client sent, if it is harmless, else a new one."""
    return sent if sent is not None and _SAFE.fullmatch(sent) else new_request_id()


def request_id(request: web.BaseRequest) -> str:
    """The request's id, the same at every call."""
    known = request.get(_KEY)
    if known is None:
        known = request[_KEY] = choose_request_id(request.headers.get(HEADER))
    return known


async def stamp_request_id(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """An `on_response_prepare` signal: every answer, streams and errors too, carries the id."""
    response.headers[HEADER] = request_id(request)

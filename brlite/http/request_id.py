"""The ids of a request: our own, and the client's `X-Request-Id`, which is returned to it. The log has both.

Clients choose theirs, so two requests may have the same one: it does not identify a request here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from aiohttp import web

HEADER = "X-Request-Id"
ANTHROPIC_HEADER = "Request-Id"  # the same id, where its SDKs read it
ID_BYTES = 16
IDS_AT_ONCE = 64

_SAFE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_KEY = web.RequestKey("request_id", str)


def new_request_id() -> str:
    """A random 128-bit id in hexadecimal."""
    return os.urandom(ID_BYTES).hex()


def request_ids() -> Iterator[str]:
    """An endless iterator of ids like those of `new_request_id`: one system call gives the random bytes of 64 ids."""
    while True:
        random = os.urandom(ID_BYTES * IDS_AT_ONCE)
        for begin in range(0, len(random), ID_BYTES):
            yield random[begin : begin + ID_BYTES].hex()


def client_request_id(sent: str | None) -> str | None:
    """The id that a client sent, if its length and characters are allowed; else None."""
    return sent if sent is not None and _SAFE.fullmatch(sent) else None


def request_id(request: web.BaseRequest) -> str:
    """Our own id of the request, the same at every call. No client chooses it, so no two requests share one."""
    known = request.get(_KEY)
    if known is None:
        known = request[_KEY] = new_request_id()
    return known


def shown_request_id(request: web.BaseRequest) -> str:
    """The id in responses and for upstreams: the client's `X-Request-Id` if that is allowed, else ours."""
    return client_request_id(request.headers.get(HEADER)) or request_id(request)

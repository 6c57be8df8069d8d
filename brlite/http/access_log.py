"""The access log: one line for each request, with the items that its handler adds. Never queries, bodies or keys.

Handlers fill `log_extras(request)`, a dict whose items are appended to the line as `name=value`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from aiohttp import web

from brlite.http.request_id import HEADER, client_request_id, request_id

logger = logging.getLogger("brlite.access")

MAX_TEXT_LENGTH = 200

_KEY = web.RequestKey("log_extras", dict)


def log_extras(request: web.BaseRequest) -> dict[str, object]:
    """The items that handlers add to the request's log line."""
    extras: dict[str, object] = request.setdefault(_KEY, {})
    return extras


def log_request(request: web.Request, status: int, milliseconds: float) -> None:
    """Log a request whose handler has ended."""
    if not logger.isEnabledFor(logging.INFO):
        return
    items = {"id": request_id(request), **log_extras(request)}
    client_id = client_request_id(request.headers.get(HEADER))
    if client_id is not None:
        items["client_id"] = client_id
    log_line(request.remote, f"{request.method} {request.raw_path}", status, milliseconds, items)


def log_line(remote: str | None, target: str, status: int, milliseconds: float, items: Mapping[str, object]) -> None:
    """Write the line of one request. `target` is its method and path; the query is left out."""
    noted = "".join(f" {name}={printable(str(value))}" for name, value in items.items())
    logger.info("%s %s %d %.1f ms%s", remote, printable(target.partition("?")[0]), status, milliseconds, noted)


def printable(text: str) -> str:
    """The text on one line: control characters escaped, cut to a maximum length."""
    cut = text[:MAX_TEXT_LENGTH]
    return repr(cut)[1:-1]

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
    extras, client_id = log_extras(request), client_request_id(request.headers.get(HEADER))
    if client_id is not None:
        extras["client_id"] = client_id
    log_line(request.remote, request.method, request.raw_path, status, milliseconds, request_id(request), extras)


def log_line(
    remote: str | None,
    method: str,
    path: str,
    status: int,
    milliseconds: float,
    request_id: str,
    extras: Mapping[str, object],
) -> None:
    """Write the line of one request. The query is left out of the path."""
    noted = "".join(f" {name}={printable(str(value))}" for name, value in extras.items())
    path = printable(path.partition("?")[0])
    logger.info("%s %s %s %d %.1f ms id=%s%s", remote, method, path, status, milliseconds, request_id, noted)


def printable(text: str) -> str:
    """The text on one line: control characters escaped, cut to a maximum length."""
    cut = text[:MAX_TEXT_LENGTH]
    return repr(cut)[1:-1]

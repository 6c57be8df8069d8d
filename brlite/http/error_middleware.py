"""The one place where exceptions become answers: inside a request everything raises, here it is turned into HTTP.

Once the first byte of an answer has gone out nothing more is sent: the connection is cut, which the client notices.
A client that left is no error. It knows no routes; the words of an answer are made in `errors.py`.
"""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.typedefs import Handler

from brlite import errors
from brlite.http.errors import error_response, status_of
from brlite.http.request_id import request_id, shown_request_id

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # nginx's number: nobody receives it, it is for the log


@web.middleware
async def errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every exception in the envelope. Cancellation passes through."""
    try:
        return await handler(request)
    except Exception as error:  # the boundary: whatever else a handler raises is our fault and becomes a 500
        return _answer(request, error)


def _answer(request: web.Request, error: Exception) -> web.StreamResponse:
    if isinstance(error, ConnectionError) and has_left(request):
        return web.Response(status=CLIENT_LEFT)
    if isinstance(error, web.HTTPException) and error.status < 400:
        raise error
    error = _in_our_words(request, error)
    _log(request, error)
    if has_begun(request):
        raise ConnectionAbortedError("the answer had begun; nothing is sent twice") from error
    response = error_response(error)
    if request.body_exists and not request.content.is_eof():
        response.force_close()  # its body has not been read: the client need not send the rest
    return response


def has_left(request: web.BaseRequest) -> bool:
    """Whether the client's connection is gone."""
    return request.transport is None or request.transport.is_closing()


def has_begun(request: web.BaseRequest) -> bool:
    """Whether a byte of the answer has been sent."""
    return request.writer.output_size > 0


def _in_our_words(request: web.Request, error: Exception) -> Exception:
    """aiohttp's own refusals as ours."""
    if isinstance(error, web.HTTPNotFound):
        return errors.NotFound(f"Invalid URL ({request.method} {request.path[:200]})")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = tuple(sorted(error.allowed_methods))
        message = f"{request.method} is not allowed at {request.path[:200]}; allowed: {', '.join(allowed)}"
        return errors.MethodNotAllowed(message, allowed=allowed)
    return error


def _log(request: web.Request, error: Exception) -> None:
    """What is the server's fault, with a traceback if nobody foresaw it. Refusals are in the access log."""
    if status_of(error).http != 500:
        return
    foreseen = isinstance(error, errors.BrliteError)
    text = f": {error}" if foreseen else ""
    logger.error(
        "request %s (%s) failed: %s%s",
        request_id(request),
        shown_request_id(request),
        type(error).__name__,
        text,
        exc_info=None if foreseen else error,
    )

"""The middleware around every handler: origin and key checks, errors as HTTP, the access log. Start at `serve`.

Handlers raise errors; only this file turns them into responses. After the first byte of a response no error response is
sent: the connection is cut, which the client notices. It is independent of routes and models.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Set

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from brlite import errors
from brlite.config.options import LimitsConfig
from brlite.dialects.errors import is_anthropic
from brlite.http.access_log import log_extras, log_request
from brlite.http.api_key import ApiKey
from brlite.http.body import BODIES, HELD, BodyBudget, HeldBody
from brlite.http.connection import has_begun
from brlite.http.cors import FETCH_SITE, Cors
from brlite.http.errors import CLIENT_LEFT, OWN_HEADERS, error_response, status_of
from brlite.http.events import WRITE_TURN, WriteTurn
from brlite.http.keys import API_KEY, KEYS, ApiKeys, shown_key
from brlite.http.origin_policy import OriginPolicy
from brlite.http.request_id import ANTHROPIC_HEADER, HEADER, request_id, shown_request_id

logger = logging.getLogger(__name__)


def add_middlewares(
    app: web.Application,
    *,
    keys: ApiKeys,
    open_paths: frozenset[str],
    origin_policy: OriginPolicy | None = None,
    quiet_paths: frozenset[str] | None = frozenset(),
) -> None:
    """Add the middleware `serve`, and the headers that every response has.

    Without an `origin_policy` the application refuses pages of all other sites. With `quiet_paths` None there is no
    access log.

    Call it after the routes were added: it looks up the open and the quiet ones. The application may have a budget of
    body bytes at `BODIES`; else it gets the default one.
    """
    app[KEYS] = keys
    app[WRITE_TURN] = WriteTurn()
    if BODIES not in app:
        app[BODIES] = BodyBudget(LimitsConfig().max_body_bytes_in_flight)
    policy = origin_policy or OriginPolicy()
    cors = Cors(policy)
    app.middlewares.append(serve(app, policy, open_paths, quiet_paths))

    async def stamp(request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Set the headers that every response has, streams and refusals included."""
        headers, key = response.headers, request.get(API_KEY)
        headers.update(OWN_HEADERS)
        headers[HEADER] = shown_request_id(request)
        if is_anthropic(request.path):
            headers[ANTHROPIC_HEADER] = headers[HEADER]
        if key is not None and key.has_limits:  # a reload may give limits to any key
            headers.update(key.headers(time.monotonic()))
        for name, value in cors.headers(request.headers.get(hdrs.ORIGIN)).items():
            headers.add(name, value)

    app.on_response_prepare.append(stamp)


def serve(app: web.Application, policy: OriginPolicy, open_paths: Set[str], quiet_paths: Set[str] | None) -> Middleware:
    """The only middleware here. Requests for `quiet_paths`, which monitors poll, are not logged. None logs no requests.

    Refusals are answered like any error, and the log has every status. Preflights need no key: browsers send them
    without one. Foreign pages and bad keys are refused before the body is read.
    """
    keys, budget = app[KEYS], app[BODIES]
    cors = Cors(policy)
    open_resources, quiet_resources = resources_at(app, open_paths), resources_at(app, quiet_paths or frozenset())

    @web.middleware
    async def serve_request(request: web.Request, handler: Handler) -> web.StreamResponse:
        begin, status = time.perf_counter(), 500
        resource = request.match_info.route.resource
        if resource is not None and request.raw_path.partition("?")[0] != resource.canonical:
            resource = None  # another spelling
        response: web.StreamResponse | None
        try:
            try:
                response = cors.preflight_response(request) if request.method == hdrs.METH_OPTIONS else None
                if response is None:
                    is_open = resource in open_resources
                    key = accepted_key(request, policy, keys, is_open=is_open)
                    if not is_open:
                        request[API_KEY] = key
                        if key.name:
                            log_extras(request)["key"] = key.name
                    held = request[HELD] = HeldBody(budget, key)
                    try:
                        response = await handler(request)
                    finally:
                        held.release()
            except Exception as error:  # the boundary: an unexpected error becomes a 500
                response = answer_error(request, error)
            status = CLIENT_LEFT if has_left(request) else response.status
            return response
        except web.HTTPException as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = CLIENT_LEFT
            raise
        finally:
            if quiet_paths is not None and resource not in quiet_resources:
                log_request(request, status, (time.perf_counter() - begin) * 1000)

    return serve_request


def accepted_key(request: web.Request, policy: OriginPolicy, keys: ApiKeys, *, is_open: bool) -> ApiKey:
    """The key that lets the request in; `is_open`: it needs none. Raises `Forbidden` and `Unauthorized`."""
    headers = request.headers
    values = [headers.getall(name, None) for name in (hdrs.HOST, hdrs.ORIGIN, FETCH_SITE)]
    host, origin, site = [None if value is None else ", ".join(value) for value in values]
    is_in = policy.lets_in(host, origin, site, keys.is_open)
    if not is_in and (refusal := policy.refusal(host, origin, site)) is not None:
        raise refusal
    if is_open or keys.is_open:
        return keys.anybody
    return keys.require(shown_key(headers.get(hdrs.AUTHORIZATION), headers.get("X-Api-Key")))


def resources_at(app: web.Application, paths: Set[str]) -> Set[web.AbstractResource]:
    """The resources of these paths. They are compared, not paths: a path gets a prefix if `app` is mounted in another.

    A request is for one of them only if its path is spelt exactly like the resource's: a proxy before this server may
    interpret any other spelling differently.
    """
    return frozenset(resource for resource in app.router.resources() if resource.canonical in paths)


def has_left(request: web.BaseRequest) -> bool:
    """Whether the client's connection is closed."""
    return request.transport is None or request.transport.is_closing()


def answer_error(request: web.Request, error: Exception) -> web.StreamResponse:
    """The response for an error that a handler raised. Raises if a response has begun, and for aiohttp's redirections.

    A client that has left is not an error.
    """
    if isinstance(error, ConnectionError) and has_left(request):
        return web.Response(status=CLIENT_LEFT)
    if isinstance(error, web.HTTPNotFound):
        error = errors.NotFound(f"unknown endpoint: {request.method} {request.path[:200]}")
    elif isinstance(error, web.HTTPMethodNotAllowed):
        allowed = tuple(sorted(error.allowed_methods))
        message = f"{request.method} is not allowed at {request.path[:200]}; allowed: {', '.join(allowed)}"
        error = errors.MethodNotAllowed(message, allowed=allowed)
    elif isinstance(error, web.HTTPException) and error.status < 400:
        raise error

    if status_of(error).http == 500:  # refusals are in the access log; a 500 is the server's fault
        is_foreseen = isinstance(error, errors.BrliteError)
        logger.error(
            "request %s (%s) failed: %s%s",
            request_id(request),
            shown_request_id(request),
            type(error).__name__,
            f": {error}" if is_foreseen else "",
            exc_info=None if is_foreseen else error,
        )
    drop_tracebacks(error)
    if has_begun(request):
        raise ConnectionAbortedError("the answer had begun; nothing is sent twice") from error
    response = error_response(error, request.path, shown_request_id(request))
    if request.body_exists and not request.content.is_eof():
        response.force_close()  # the body was not read: the client need not send the rest
    return response


def drop_tracebacks(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and of those that led to it.

    They refer to frames, and frames often to the error. Such a cycle would keep the request's body until the garbage
    collector runs, while `BodyBudget` no longer counts it.
    """
    errors, seen = [error], set[int]()  # a cause may lead to its own effect
    while errors:
        error = errors.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            error.__traceback__ = None
            errors += (error.__context__, error.__cause__)

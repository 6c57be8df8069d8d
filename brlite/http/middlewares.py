"""Gives an application the middlewares of this room, in the one order that works. It knows no routes and no models."""

from __future__ import annotations

from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.http.access_log import access_log_middleware
from brlite.http.body import BODIES, bodies_middleware
from brlite.http.body_budget import BodyBudget
from brlite.http.cors import Cors
from brlite.http.error_middleware import errors_middleware
from brlite.http.errors import OWN_HEADERS
from brlite.http.keys import KEYS, ApiKeys, keys_middleware, stamp_limits
from brlite.http.origin_policy import OriginPolicy
from brlite.http.request_id import stamp_request_id
from brlite.http.resources import Resources


def add_middlewares(
    app: web.Application,
    *,
    keys: ApiKeys,
    open_paths: frozenset[str],
    origin_policy: OriginPolicy | None = None,
    access_log: bool = True,
    quiet_paths: frozenset[str] = frozenset(),
) -> None:
    """Outermost first: the log sees every status, preflights need no key, refusals are answered like any error.

    Without a policy of its own an application refuses pages of all other sites.

    The application has its routes by then: the open and the quiet ones are looked up among them. It may have a budget
    of body bytes at `BODIES`; else it gets the default one.
    """
    app[KEYS] = keys
    if BODIES not in app:
        app[BODIES] = BodyBudget(LimitsConfig().max_body_bytes_in_flight)
    app.on_response_prepare.append(_stamp_own_headers)
    app.on_response_prepare.append(stamp_request_id)
    app.on_response_prepare.append(stamp_limits)  # always: a key may be given limits while the server runs
    if access_log:
        app.middlewares.append(access_log_middleware(Resources(app, quiet_paths)))
    cors = Cors(origin_policy or OriginPolicy())
    app.on_response_prepare.append(cors.mark)
    app.middlewares.append(cors.answer_preflight)
    app.middlewares.append(errors_middleware)
    app.middlewares.append(cors.refuse)
    app.middlewares.append(keys_middleware(keys, Resources(app, open_paths)))
    app.middlewares.append(bodies_middleware(app[BODIES]))


async def _stamp_own_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    response.headers.update(OWN_HEADERS)

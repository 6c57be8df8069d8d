"""CORS: answers preflights and sets the headers for web pages.

Preflights are answered before the key check, since browsers send them without keys. A page that may use the server may
use all its endpoints.
"""

from __future__ import annotations

from aiohttp import hdrs, web

from brlite.http.origin_policy import ANY, OriginPolicy

PREFLIGHT_SECONDS = 600
METHODS = "GET, POST, DELETE, OPTIONS"
EXPOSED_HEADERS = "X-Request-Id, Retry-After"
FETCH_SITE = "Sec-Fetch-Site"
ASKS_PRIVATE_NETWORK = "Access-Control-Request-Private-Network"
ALLOWS_PRIVATE_NETWORK = "Access-Control-Allow-Private-Network"


class Cors:
    """Applies an origin policy to requests and responses of aiohttp."""

    def __init__(self, policy: OriginPolicy) -> None:
        self._origins = policy.allowed_origins

    def preflight_response(self, request: web.Request) -> web.Response | None:
        """204 for the preflight of an allowed origin; None for any other request."""
        is_preflight = request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        if not is_preflight or self._allowed(request.headers.get(hdrs.ORIGIN)) is None:
            return None
        headers: dict[str, str] = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: METHODS,
            hdrs.ACCESS_CONTROL_MAX_AGE: str(PREFLIGHT_SECONDS),
        }
        # OpenAI's browser client adds its own headers (x-stainless-*), so all requested headers are allowed.
        if wanted := request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS):
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = wanted
        if request.headers.get(ASKS_PRIVATE_NETWORK) == "true":  # a public page calls a server in a private network
            headers[ALLOWS_PRIVATE_NETWORK] = "true"
        return web.Response(status=204, headers=headers)

    def headers(self, origin: str | None) -> dict[str, str]:
        """The headers of a response to a page of this origin: whether the page may read it, and `Vary` for caches."""
        if not self._origins:
            return {}
        headers: dict[str, str] = {} if ANY in self._origins else {hdrs.VARY: hdrs.ORIGIN}
        if (allowed := self._allowed(origin)) is not None:
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = allowed
            headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED_HEADERS
        return headers

    def _allowed(self, origin: str | None) -> str | None:
        if origin is None:
            return None
        if ANY in self._origins:
            return ANY
        return origin if origin in self._origins else None

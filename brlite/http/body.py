"""Reads a request's body under our own limits of size and time, after its headers have shown that it can be JSON.

By default aiohttp waits for a body without a limit, and inflates compressed ones. What is read counts against the
application's `BodyBudget` until the request ends, because the body is kept for that long. Bytes count as they
arrive, so a client that only announces a large body takes nothing. While a body arrives, its request also counts
against the limits of its key. It knows nothing of what the JSON means.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from aiohttp import StreamReader, hdrs, web

from brlite.config.options import LimitsConfig
from brlite.errors import (
    BodyTooLarge,
    InvalidRequest,
    NotReady,
    RateLimited,
    RequestError,
    RequestTimeout,
    UnsupportedMediaType,
)
from brlite.http.api_key import ApiKey
from brlite.http.connection import invite_body

RETRY_SECONDS = 1


class BodyBudget:
    """At most `max_bytes` in sum. One tenant may hold half of them; requests without a key have no tenant."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._by_tenant: dict[str, int] = {}

    def take(self, tenant: str, num_bytes: int) -> RequestError | None:
        """Hold so many bytes more for the tenant, or return why that is refused. `release` must follow."""
        if self.num_bytes + num_bytes > self.max_bytes:
            return NotReady(
                f"The server holds {self.max_bytes} bytes of request bodies, as many as it may "
                "(limits.max_body_bytes_in_flight); try again when requests have ended",
                retry_after_seconds=RETRY_SECONDS,
            )
        if tenant:
            num_held = self._by_tenant.get(tenant, 0) + num_bytes
            if num_held > self.max_bytes // 2:
                return RateLimited(
                    f"The requests of this API key hold {self.max_bytes // 2} bytes of bodies, as many as one key may "
                    "(half of limits.max_body_bytes_in_flight); try again when some have ended",
                    retry_after_seconds=RETRY_SECONDS,
                )
            self._by_tenant[tenant] = num_held
        self.num_bytes += num_bytes
        return None

    def release(self, tenant: str, num_bytes: int) -> None:
        """Hold so many bytes fewer."""
        self.num_bytes -= num_bytes
        if tenant:
            num_held = self._by_tenant.pop(tenant, 0) - num_bytes
            if num_held:
                self._by_tenant[tenant] = num_held


@dataclass
class HeldBody:
    """What one request takes of the budget. `release` must follow, and may be called twice."""

    budget: BodyBudget
    key: ApiKey
    num_bytes: int = 0
    is_arriving: bool = False

    def arrive(self, now: float) -> RateLimited | None:
        """Count a request whose body is still to come against its key's limits, or return the refusal."""
        refusal = self.key.arrival_refusal(now)
        if refusal is None and not self.is_arriving:
            self.is_arriving = True
            self.key.num_arriving += 1
        return refusal

    def arrived(self) -> None:
        """End what `arrive` began: the body is complete, or will not be read."""
        if self.is_arriving:
            self.is_arriving = False
            self.key.num_arriving -= 1

    def take(self, num_bytes: int) -> RequestError | None:
        """Hold so many bytes more, or return why that is refused."""
        refusal = self.budget.take(self.key.tenant, num_bytes)
        if refusal is None:
            self.num_bytes += num_bytes
        return refusal

    def release(self) -> None:
        """The request has ended."""
        self.arrived()
        self.budget.release(self.key.tenant, self.num_bytes)
        self.num_bytes = 0


BODIES = web.AppKey("bodies", BodyBudget)
_KEPT = web.RequestKey("body", bytes)
HELD = web.RequestKey("held", HeldBody)


async def read_body(request: web.BaseRequest, limits: LimitsConfig) -> bytes:
    """The whole body, or `BodyTooLarge`, `RequestTimeout`, `UnsupportedMediaType`, or `InvalidRequest` if it is cut.

    Its limits: `max_body_bytes`, `body_seconds`. Raises `RateLimited` at once where the key's limits leave no room
    for the request, and `RateLimited` or `NotReady` when the body is more than the server may hold beside the others.
    """
    kept: bytes | None = request.get(_KEPT)
    if kept is not None:
        return kept
    max_bytes, seconds = limits.max_body_bytes, limits.body_seconds
    encoding, kind = request.headers.get(hdrs.CONTENT_ENCODING, "identity"), request.content_type
    if encoding.lower() != "identity":
        raise UnsupportedMediaType("Compressed bodies are not accepted; send it without Content-Encoding.")
    # text/plain and form types are refused also because a foreign web page may send them without asking (CORS).
    if hdrs.CONTENT_TYPE in request.headers and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType("The body must be JSON; send the header 'Content-Type: application/json'.")
    if (request.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    held = request[HELD]
    if request.content.is_eof():  # all of it came with the headers: no task, no timer
        body = request.content.read_nowait()
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if refusal := held.take(len(body)):
            raise _counted(held, refusal)
        return body
    if too_many := held.arrive(time.monotonic()):
        raise _counted(held, too_many)
    await invite_body(request)
    try:
        return await asyncio.wait_for(_collect(request.content, max_bytes, held), seconds)
    except asyncio.TimeoutError:
        raise RequestTimeout(f"The request body did not arrive within {seconds:g} s.") from None
    except web.RequestPayloadError:
        raise InvalidRequest("The request body is not framed as its headers say.", code="invalid_body") from None
    finally:
        held.arrived()


def keep_body(request: web.BaseRequest, body: bytes) -> None:
    """Keep a body that was read, for the next `read_body`."""
    request[_KEPT] = body


async def leave_body(request: web.Request) -> None:
    """An `expect_handler` for routes: leaves `Expect: 100-continue` unanswered until `read_body` wants the body.

    So a body that is too large, or comes without a key, is refused before it is sent.
    """


async def _collect(content: StreamReader, max_bytes: int, held: HeldBody) -> bytes:
    body = bytearray()
    while block := await content.readany():
        if refusal := held.take(len(block)):
            raise _counted(held, refusal)
        body += block
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _counted(held: HeldBody, refusal: RequestError) -> RequestError:
    if isinstance(refusal, RateLimited):
        held.key.usage.num_rate_limited += 1
    return refusal


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than the {max_bytes} bytes that this server allows.")

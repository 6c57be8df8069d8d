"""Reads a request's body under our own limits of size and time, after its headers have shown that it can be JSON.

By default aiohttp waits for a body without a time limit, and inflates compressed ones. A body counts against the
application's `BodyBudget` until the request ends, because it is kept for that long. Bytes count as they arrive, so a
client that only announces a large body uses nothing. While a body arrives, its request also counts against the limits
of its key. This file does not parse the JSON.
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
    """Bounds the bytes of all bodies by `max_bytes`, and those of one tenant by half of it. No key means no tenant."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._by_tenant: dict[str, int] = {}

    def take(self, tenant: str, num_bytes: int) -> RequestError | None:
        """Take `num_bytes` for the tenant, or return the refusal. `release` must follow."""
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
        """Give `num_bytes` of the tenant back."""
        self.num_bytes -= num_bytes
        if tenant:
            num_held = self._by_tenant.pop(tenant, 0) - num_bytes
            if num_held:
                self._by_tenant[tenant] = num_held


@dataclass
class HeldBody:
    """The part of the budget that one request uses. `release` must follow, and may be called twice."""

    budget: BodyBudget
    key: ApiKey
    num_bytes: int = 0
    is_arriving: bool = False

    def arrive(self, now: float) -> RateLimited | None:
        """Count a request against its key's limits before its body arrives, or return the refusal."""
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
        """Take `num_bytes` more, or return the refusal."""
        refusal = self.budget.take(self.key.tenant, num_bytes)
        if refusal is None:
            self.num_bytes += num_bytes
        return refusal

    def hand_over(self) -> HeldBody:
        """Another one with the bytes of this one, for work that goes on when the request has ended."""
        other, self.num_bytes = HeldBody(self.budget, self.key, self.num_bytes), 0
        return other

    def release(self) -> None:
        """Give all bytes back: the request has ended."""
        self.arrived()
        self.budget.release(self.key.tenant, self.num_bytes)
        self.num_bytes = 0


BODIES = web.AppKey("bodies", BodyBudget)
_KEPT = web.RequestKey("body", bytes)
HELD = web.RequestKey("held", HeldBody)


async def read_body(request: web.BaseRequest, limits: LimitsConfig) -> bytes:
    """Read the whole body. Its limits are `max_body_bytes` and `body_seconds`.

    Raises `BodyTooLarge`, `RequestTimeout`, `UnsupportedMediaType`, or `InvalidRequest` if the body is incomplete.
    Raises `RateLimited` at once if the key's limits do not allow the request. Raises `RateLimited` or `NotReady` if
    the body exceeds what is left of the budget.
    """
    kept: bytes | None = request.get(_KEPT)
    if kept is not None:
        return kept
    max_bytes, seconds = limits.max_body_bytes, limits.body_seconds
    encoding, kind = request.headers.get(hdrs.CONTENT_ENCODING, "identity"), request.content_type
    if encoding.lower() != "identity":
        raise UnsupportedMediaType("Compressed bodies are not accepted; send it without Content-Encoding.")
    # Another reason to refuse text/plain and form types: a foreign web page may send them without a CORS preflight.
    if hdrs.CONTENT_TYPE in request.headers and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType("The body must be JSON; send the header 'Content-Type: application/json'.")
    if (request.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    held = request[HELD]
    if request.content.is_eof():  # the whole body came with the headers: no task, no timer
        body = request.content.read_nowait()
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if refusal := held.take(len(body)):
            raise _counted(held, refusal)
        return body
    if too_many := held.arrive(time.monotonic()):
        raise _counted(held, too_many)
    await invite_body(request)
    # No `wait_for`: before Python 3.12 it drops the cancellation of a client that leaves behind its last byte.
    timer = asyncio.get_running_loop().call_later(seconds, request.content.set_exception, asyncio.TimeoutError())
    try:
        return await _collect(request.content, max_bytes, held)
    except asyncio.TimeoutError:
        raise RequestTimeout(f"The request body did not arrive within {seconds:g} s (limits.body_seconds).") from None
    except web.RequestPayloadError:
        raise InvalidRequest("The request body is not framed as its headers say.", code="invalid_body") from None
    finally:
        timer.cancel()
        held.arrived()


def keep_body(request: web.BaseRequest, body: bytes) -> None:
    """Store a body that was read; the next `read_body` returns it."""
    request[_KEPT] = body


async def leave_body(request: web.Request) -> None:
    """An `expect_handler` for routes: `Expect: 100-continue` is answered only when `read_body` is called.

    So a request with a too large body, or without a key, is refused before the body is sent.
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
    return BodyTooLarge(
        f"The request body is larger than the {max_bytes} bytes that this server allows (limits.max_body_bytes)."
    )

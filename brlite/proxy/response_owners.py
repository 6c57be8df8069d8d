"""Maps each tenant's stored responses to their upstreams, so that later requests go to the upstream that has one.

Upstreams see one API key for all clients. This file lets a tenant use only its own responses, by path and by
`previous_response_id`. Ids are read from the answers of `POST /v1/responses`. An answer longer than `proxy.held_bytes`
is not read, so its id stays unknown.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from brlite.dialects.json_body import DECODE_ERRORS, decode_fields, decode_json
from brlite.errors import InvalidRequest
from brlite.http.bounded_store import OBJECT_BYTES, BoundedStore
from brlite.proxy.exchange import Exchange
from brlite.proxy.request_model import Inbound
from brlite.proxy.usage import NO_USAGE, ForwardedUsage
from brlite.proxy.wire.heads import stored_response_id

logger = logging.getLogger(__name__)

RESPONSES_PATH = b"/v1/responses"
_PREVIOUS = "previous_response_id"
_BEGINNING = b'"previou'  # of that name in any letter case. Behind it Go takes a long s (U+017F) for an s
_ID = re.compile(r"[!-.0-~]{1,200}")


class ResponseOwner(msgspec.Struct, frozen=True):
    """The upstream that stores a response, and the model that made it.

    `charged`: its tokens that were charged. With `is_reported` no estimate counts. `num_body_bytes`: of its request.
    """

    upstream: str
    model: str
    num_body_bytes: int
    charged: ForwardedUsage = NO_USAGE
    is_reported: bool = False


class StoredResponse(NamedTuple):
    """A response that an upstream has stored. `is_running`: it is computed although no client waits for it."""

    id: str
    is_running: bool


class _Response(msgspec.Struct):
    """The fields of a response object that are read."""

    id: str | None = None
    store: bool | None = None
    background: object = None
    status: object = None


class _Answer(_Response):
    """A response, or an event with one."""

    response: _Response | None = None


class _Previous:
    """The type of `previous_response_id`. msgspec calls the hook for each one, which shows repeated fields."""


class _Continuing(msgspec.Struct):
    previous_response_id: _Previous | msgspec.UnsetType = msgspec.UNSET


_ANSWER = msgspec.json.Decoder(_Answer)


class ResponseOwners:
    """The owners of stored responses by tenant and id, in at most `max_bytes`; 0: none are kept."""

    def __init__(self, max_bytes: int) -> None:
        self.store: BoundedStore[ResponseOwner] = BoundedStore(
            max_bytes, name="max_owner_bytes", what="upstreams' response ids"
        )

    def find(self, tenant: str, response_id: str, active: Iterable[Exchange]) -> ResponseOwner | None:
        """The owner of a tenant's response, also of one that an exchange of `active` is relaying. None: unknown."""
        owner = self.store.get(tenant, response_id)
        if owner is None and self.store.is_enabled:
            for exchange in active:
                inbound = exchange.request.inbound
                if inbound.key.tenant == tenant and (made := _made(exchange)) is not None and made.id == response_id:
                    return _owner(exchange)
        return owner

    def owner_for(self, inbound: Inbound, active: Iterable[Exchange]) -> ResponseOwner | None:
        """The owner of the response that the request names or continues. None: any upstream may get the request.

        Raises `InvalidRequest` if the request has a tenant and the response is not known as the tenant's.
        """
        tenant, response_id = inbound.key.tenant, stored_response_id(inbound.head)
        response_id = response_id or _previous_response_id(inbound.body)
        if response_id is None:
            return None
        owner = self.find(tenant, response_id, active)
        if owner is None and tenant:
            text = (
                f"Previous response with id {response_id[:64]!r} not found: it is not known as one of this API key's."
            )
            raise InvalidRequest(text, param=_PREVIOUS, code="previous_response_not_found")
        return owner

    def note(self, exchange: Exchange) -> StoredResponse | None:
        """Record a finished exchange: keep the id of a new response, remove the id of a deleted one.

        Returns the new response. `note_charge` follows when its key is charged.
        """
        inbound, attempt = exchange.request.inbound, exchange.attempt
        if attempt is None or not attempt.has_begun or attempt.status >= 400:
            return None
        tenant, response_id = inbound.key.tenant, stored_response_id(inbound.head)
        if response_id is not None:
            if inbound.head.method == b"DELETE":
                self.store.pop(tenant, response_id)
            return None
        made = _made(exchange)
        if made is None:
            return None
        known, owner = self.store.get(tenant, made.id), _owner(exchange)
        if known is None or known.upstream != owner.upstream:
            self._put(tenant, made.id, owner)
            if known is not None:
                text = "upstreams %s and %s made responses with the same id, %s: requests about it go to the second"
                logger.warning(text, known.upstream, owner.upstream, made.id)
        return made

    def note_charge(self, tenant: str, response_id: str, used: ForwardedUsage, *, is_reported: bool) -> ForwardedUsage:
        """Note the tokens of a stored response, as reported or estimated. Returns those that are to be charged now."""
        owner = self.store.get(tenant, response_id)
        if owner is None or (owner.is_reported and not is_reported):
            return NO_USAGE
        charged = ForwardedUsage(*map(max, owner.charged, used))
        is_reported |= owner.is_reported
        self._put(tenant, response_id, msgspec.structs.replace(owner, charged=charged, is_reported=is_reported))
        return ForwardedUsage(*map(operator.sub, charged, owner.charged))

    def _put(self, tenant: str, response_id: str, owner: ResponseOwner) -> None:
        num_bytes = len(response_id) + len(owner.upstream) + len(owner.model) + OBJECT_BYTES
        self.store.put(tenant, response_id, owner, num_bytes)


def _owner(exchange: Exchange) -> ResponseOwner:
    assert exchange.attempt is not None  # its response contained an id
    return ResponseOwner(exchange.attempt.upstream.name, exchange.route.model, len(exchange.request.inbound.body))


def _made(exchange: Exchange) -> StoredResponse | None:
    """The response that the exchange has made and relays, as last seen. None if no stored one has been seen yet."""
    attempt = exchange.attempt
    if attempt is None or exchange.request.inbound.head.target.partition(b"?")[0] != RESPONSES_PATH:
        return None
    return stored_response(attempt.seen.parts)


def stored_response(parts: Iterable[bytes]) -> StoredResponse | None:
    """The response object in the last part that has one. None if its `store` is false, or without a valid id."""
    found = None
    for part in parts:
        try:
            answer = _ANSWER.decode(part)
        except DECODE_ERRORS:
            continue
        response = answer.response or answer
        if response.id is not None and _ID.fullmatch(response.id) and response.store is not False:
            is_running = response.background is True and response.status in ("queued", "in_progress")
            found = StoredResponse(response.id, is_running)
    return found


def _previous_response_id(body: bytes) -> str | None:
    """The body's `previous_response_id`. Raises `InvalidRequest` if it is repeated, or neither a string nor null.

    The upstream must read the id that was checked here: so names with escaped letters are found, too.
    """
    if _BEGINNING not in body.lower() and b"\\u" not in body:
        return None
    for name in decode_fields(body):
        if name != _PREVIOUS and name.casefold() == _PREVIOUS:  # servers in Go read it, too
            raise InvalidRequest(f"this field must be written {_PREVIOUS!r}", param=_PREVIOUS)
    found: list[object] = []

    def take(kind: type[object], value: object) -> _Previous:
        found.append(value)
        return _Previous()

    decode_json(body, msgspec.json.Decoder(_Continuing, dec_hook=take))
    if len(found) > 1 or not isinstance(value := found[0] if found else None, str | None):
        raise InvalidRequest(f"{_PREVIOUS} must be a string or null, and stand there once", param=_PREVIOUS)
    return value

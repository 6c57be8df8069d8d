"""Maps each tenant's stored responses to their upstreams, so that later requests go to the upstream that has one.

Upstreams see one API key for all clients. This file lets a tenant use only its own responses, by path and by
`previous_response_id`. Ids are read from the answers of `POST /v1/responses`. An answer longer than `proxy.held_bytes`
is not read, so its id stays unknown.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import msgspec

from brlite.dialects.json_body import DECODE_ERRORS, decode_fields, decode_json
from brlite.errors import InvalidRequest
from brlite.http.bounded_store import OBJECT_BYTES, BoundedStore
from brlite.proxy.exchange import Exchange
from brlite.proxy.request_model import Inbound
from brlite.proxy.usage import ForwardedUsage, estimate_completion, is_possible, reported_usage
from brlite.proxy.wire.heads import stored_response_id

logger = logging.getLogger(__name__)

RESPONSES_PATH = b"/v1/responses"
_PREVIOUS = "previous_response_id"
_BEGINNING = b'"previou'  # of that name in any letter case. Behind it Go takes a long s (U+017F) for an s
_ID = re.compile(r"[!-.0-~]{1,200}")


class ResponseOwner(msgspec.Struct, frozen=True):
    """The upstream that stores a response, and the model that made it. `is_counted`: its usage was reported."""

    upstream: str
    model: str
    is_counted: bool


class _Response(msgspec.Struct):
    id: str | None = None
    store: bool | None = None


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
                if inbound.key.tenant == tenant and _makes_response(inbound) and _relayed_id(exchange) == response_id:
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

    def note(self, exchange: Exchange) -> None:
        """Record a finished exchange: keep the id of a new response, remove the id of a deleted one."""
        inbound, attempt = exchange.request.inbound, exchange.attempt
        if attempt is None or not attempt.has_begun or attempt.status >= 400:
            return
        tenant, response_id = inbound.key.tenant, stored_response_id(inbound.head)
        if response_id is None:
            response_id = _relayed_id(exchange) if _makes_response(inbound) else None
            if response_id is not None and self.store.get(tenant, response_id) is None:
                self._put(tenant, response_id, _owner(exchange))
        elif inbound.head.method == b"DELETE":
            self.store.pop(tenant, response_id)

    def late_usage(self, exchange: Exchange) -> ForwardedUsage:
        """The completion tokens of a stored response, when its usage is reported for the first time; else 0.

        The usage of a response made in the background is reported when the response is retrieved later.
        """
        attempt, inbound = exchange.attempt, exchange.request.inbound
        response_id = stored_response_id(inbound.head)
        usage = None if attempt is None else reported_usage(attempt.seen.parts)
        if attempt is None or usage is None or response_id is None:
            return ForwardedUsage()
        owner = self.store.get(inbound.key.tenant, response_id)
        if owner is None or owner.is_counted:
            return ForwardedUsage()
        self._put(inbound.key.tenant, response_id, msgspec.structs.replace(owner, is_counted=True))
        late, num_text_bytes = ForwardedUsage(0, usage.completion_tokens), attempt.seen.num_text_bytes
        if is_possible(late, 0, num_text_bytes):
            return late
        text = "upstream %s reports impossible usage for a stored response: %d tokens; estimated instead"
        logger.warning(text, owner.upstream, usage.completion_tokens)
        return ForwardedUsage(0, estimate_completion(RESPONSES_PATH, attempt.seen))

    def _put(self, tenant: str, response_id: str, owner: ResponseOwner) -> None:
        num_bytes = len(response_id) + len(owner.upstream) + len(owner.model) + OBJECT_BYTES
        self.store.put(tenant, response_id, owner, num_bytes)


def _makes_response(inbound: Inbound) -> bool:
    return inbound.head.target.partition(b"?")[0] == RESPONSES_PATH


def _owner(exchange: Exchange) -> ResponseOwner:
    assert exchange.attempt is not None  # its response contained an id
    is_counted = reported_usage(exchange.attempt.seen.parts) is not None
    return ResponseOwner(exchange.attempt.upstream.name, exchange.route.model, is_counted)


def _relayed_id(exchange: Exchange) -> str | None:
    """The id of the relayed response object. None if its `store` is false, or no valid id has been seen yet."""
    for part in () if exchange.attempt is None else exchange.attempt.seen.parts:
        try:
            answer = _ANSWER.decode(part)
        except DECODE_ERRORS:
            continue
        response = answer.response or answer
        if response.id is not None and _ID.fullmatch(response.id) and response.store is not False:
            return response.id
    return None


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

"""Which upstream stores which response of whom, so that a request about one goes to the upstream that has it.

Upstreams know all clients by one API key. Here a tenant reaches its own responses only, by path and by
`previous_response_id`. Ids are read from the answers of `POST /v1/responses`; an answer that is longer than
`proxy.held_bytes` is not looked at, so its id is not known afterwards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import msgspec

from brlite.dialects.json_body import decode_json
from brlite.errors import InvalidRequest
from brlite.http.bounded_store import OBJECT_BYTES, BoundedStore
from brlite.proxy.exchange import Exchange
from brlite.proxy.request_model import Inbound
from brlite.proxy.usage import ForwardedUsage, estimate_completion, is_possible, told_usage
from brlite.proxy.wire.heads import stored_response_id

logger = logging.getLogger(__name__)

RESPONSES_PATH = b"/v1/responses"
_PREVIOUS = b'"previous_response_id"'
_ID = re.compile(r"[!-.0-~]{1,200}")


class ResponseOwner(msgspec.Struct, frozen=True):
    """The upstream that has a response, and the model that it was asked of. `is_counted`: its usage was told."""

    upstream: str
    model: str
    is_counted: bool


class _Told(msgspec.Struct):
    id: str | None = None
    store: bool | None = None


class _ToldResponse(_Told):
    """A response, or an event with one."""

    response: _Told | None = None


class _Previous:
    """The type of `previous_response_id`. msgspec calls the hook for each one, which shows repeated fields."""


class _Continuing(msgspec.Struct):
    previous_response_id: _Previous | msgspec.UnsetType = msgspec.UNSET


_TOLD = msgspec.json.Decoder(_ToldResponse)


class ResponseOwners:
    """The owners of stored responses by tenant and id, in at most `max_bytes`; 0: none are kept."""

    def __init__(self, max_bytes: int) -> None:
        self.store: BoundedStore[ResponseOwner] = BoundedStore(
            max_bytes, name="max_owner_bytes", what="upstreams' response ids"
        )

    def find(self, tenant: str, response_id: str, active: Iterable[Exchange]) -> ResponseOwner | None:
        """The owner of a tenant's response, which one of the `active` exchanges may just be relaying."""
        owner = self.store.get(tenant, response_id)
        if owner is None and self.store.is_enabled:
            for exchange in active:
                inbound = exchange.request.inbound
                if inbound.key.tenant == tenant and _makes_response(inbound) and _told_id(exchange) == response_id:
                    return _owner(exchange)
        return owner

    def owner_for(self, inbound: Inbound, active: Iterable[Exchange]) -> ResponseOwner | None:
        """The owner of the response that the request is about or continues; None: it may go to any upstream.

        Raises `InvalidRequest` for a tenant that continues a response which is not known as its own.
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
            raise InvalidRequest(text, param="previous_response_id", code="previous_response_not_found")
        return owner

    def note(self, exchange: Exchange) -> None:
        """Keep what a finished exchange tells: a new response, one that is deleted, one whose usage is known by now."""
        inbound, attempt = exchange.request.inbound, exchange.attempt
        if attempt is None or not attempt.has_begun or attempt.status >= 400:
            return
        tenant, response_id = inbound.key.tenant, stored_response_id(inbound.head)
        if response_id is None:
            response_id = _told_id(exchange) if _makes_response(inbound) else None
            if response_id is not None and self.store.get(tenant, response_id) is None:
                self._put(tenant, response_id, _owner(exchange))
        elif inbound.head.method == b"DELETE":
            self.store.pop(tenant, response_id)

    def late_usage(self, exchange: Exchange) -> ForwardedUsage:
        """What a stored response has cost beside its prompt, when that is told for the first time.

        A response that is made in the background tells it to those who look at it later.
        """
        attempt, inbound = exchange.attempt, exchange.request.inbound
        response_id = stored_response_id(inbound.head)
        told = None if attempt is None else told_usage(attempt.seen.parts)
        if attempt is None or told is None or response_id is None:
            return ForwardedUsage()
        owner = self.store.get(inbound.key.tenant, response_id)
        if owner is None or owner.is_counted:
            return ForwardedUsage()
        self._put(inbound.key.tenant, response_id, msgspec.structs.replace(owner, is_counted=True))
        late, num_text_bytes = ForwardedUsage(0, told.completion_tokens), attempt.seen.num_text_bytes
        if is_possible(late, 0, num_text_bytes):
            return late
        text = "upstream %s reports impossible usage for a stored response: %d tokens; estimated instead"
        logger.warning(text, owner.upstream, told.completion_tokens)
        return ForwardedUsage(0, estimate_completion(RESPONSES_PATH, attempt.seen))

    def _put(self, tenant: str, response_id: str, owner: ResponseOwner) -> None:
        num_bytes = len(response_id) + len(owner.upstream) + len(owner.model) + OBJECT_BYTES
        self.store.put(tenant, response_id, owner, num_bytes)


def _makes_response(inbound: Inbound) -> bool:
    return inbound.head.target.partition(b"?")[0] == RESPONSES_PATH


def _owner(exchange: Exchange) -> ResponseOwner:
    assert exchange.attempt is not None  # it has told an id
    is_counted = told_usage(exchange.attempt.seen_by_now.parts) is not None
    return ResponseOwner(exchange.attempt.upstream.name, exchange.route.model, is_counted)


def _told_id(exchange: Exchange) -> str | None:
    """The id of the response that an exchange relays or has relayed. None if it is not stored, or not known."""
    for part in () if exchange.attempt is None else exchange.attempt.seen_by_now.parts:
        try:
            told = _TOLD.decode(part)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        response = told.response or told
        if response.id is not None and _ID.fullmatch(response.id) and response.store is not False:
            return response.id
    return None


def _previous_response_id(body: bytes) -> str | None:
    """The id that the body continues. Raises `InvalidRequest` if it is ambiguous or no string.

    An upstream must not find another one than was looked at: neither behind an escaped letter, nor a repeated field.
    """
    if _PREVIOUS not in body and b"\\u" not in body:
        return None
    found: list[object] = []

    def take(kind: type[object], value: object) -> _Previous:
        found.append(value)
        return _Previous()

    decode_json(body, msgspec.json.Decoder(_Continuing, dec_hook=take))
    if len(found) > 1 or not isinstance(value := found[0] if found else None, str | None):
        text = "previous_response_id must be a string or null, and stand there once"
        raise InvalidRequest(text, param="previous_response_id")
    return value

"""Finished responses in memory, by the tenant that they belong to. Nothing is written to a disk.

One tenant never sees another's. The bytes of all together are bounded; beyond that the oldest response of the tenant
that holds most is forgotten, so that no tenant can push out the others'.
"""

from __future__ import annotations

import logging
import time

from aiohttp import web
from msgspec import Raw

from brlite.dialects.responses_encoder import FinishedResponse

logger = logging.getLogger(__name__)

OBJECT_BYTES = 256  # what Python takes for an item or a response besides its bytes
SECONDS_BETWEEN_LINES = 60.0  # of the log, about a full store


class ResponseStore:
    """At most `max_bytes` of responses; 0 keeps none."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self.num_forgotten = 0
        self._max_bytes = max_bytes
        self._tenants: dict[str, TenantResponses] = {}
        self._num_unlogged = 0
        self._next_line = 0.0

    @property
    def is_enabled(self) -> bool:
        return self._max_bytes > 0

    @property
    def num_responses(self) -> int:
        return sum(len(responses) for responses in self._tenants.values())

    def of(self, tenant: str) -> TenantResponses:
        """The responses of a tenant."""
        if tenant not in self._tenants:
            self._tenants[tenant] = TenantResponses(self)
        return self._tenants[tenant]

    def changed(self, num_bytes: int) -> None:
        """A tenant has added or removed so many bytes: forget what is too much."""
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            self.num_forgotten += 1
            self._num_unlogged += 1
            max(self._tenants.values(), key=lambda each: each.num_bytes).forget_oldest()
        if self._num_unlogged and time.monotonic() >= self._next_line:
            logger.warning(
                "the store of responses is full (limits.max_stored_bytes = %d): forgot the %d oldest",
                self._max_bytes,
                self._num_unlogged,
            )
            self._num_unlogged, self._next_line = 0, time.monotonic() + SECONDS_BETWEEN_LINES


class TenantResponses:
    """The responses of one tenant, oldest first."""

    def __init__(self, store: ResponseStore) -> None:
        self.num_bytes = 0
        self._store = store
        self._responses: dict[str, FinishedResponse] = {}
        self._items: dict[str, Raw] = {}  # of outputs, by their ids

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def is_enabled(self) -> bool:
        return self._store.is_enabled

    def get(self, response_id: str) -> FinishedResponse | None:
        return self._responses.get(response_id)

    def conversation(self, response_id: str) -> list[Raw] | None:
        """The items that went into a response and came out of it. None if it is not stored."""
        response = self._responses.get(response_id)
        return None if response is None else [*response.input, *response.output.values()]

    def item(self, item_id: str) -> Raw | None:
        """An item of a stored response's output. None if there is none."""
        return self._items.get(item_id)

    def keep(self, response: FinishedResponse) -> None:
        """Store a response. Its items are copied: they are views of request bodies, which must not stay."""
        response = FinishedResponse(
            response.id, response.body, tuple(item.copy() for item in response.input), response.output
        )
        self._responses[response.id] = response
        self._items |= response.output
        size = _size(response)
        self.num_bytes += size
        self._store.changed(size)

    def delete(self, response_id: str) -> bool:
        """Forget a response. False if it is not stored."""
        response = self._responses.pop(response_id, None)
        if response is None:
            return False
        for item_id in response.output:
            self._items.pop(item_id, None)
        size = _size(response)
        self.num_bytes -= size
        self._store.changed(-size)
        return True

    def forget_oldest(self) -> None:
        self.delete(next(iter(self._responses)))


STORE = web.AppKey("response_store", ResponseStore)


def _size(response: FinishedResponse) -> int:
    """The bytes of a response. Items that it shares with others count each time."""
    items = (*response.input, *response.output.values())
    return len(response.body) + sum(len(bytes(item)) for item in items) + OBJECT_BYTES * (len(items) + 1)

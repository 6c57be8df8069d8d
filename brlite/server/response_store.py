"""Stores finished responses for `previous_response_id`, separately for each tenant. No tenant sees another's."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web
from msgspec import Raw

from brlite.dialects.responses_encoder import response_id_of
from brlite.dialects.responses_stored import FinishedResponse
from brlite.errors import InvalidRequest
from brlite.http.bounded_store import OBJECT_BYTES, BoundedStore

ResponseStore = BoundedStore[FinishedResponse]
STORE: web.AppKey[ResponseStore] = web.AppKey("response_store")


def make_response_store(max_bytes: int) -> ResponseStore:
    return BoundedStore(max_bytes, name="max_stored_bytes", what="responses")


class TenantResponses:
    """The responses of one tenant: those in progress in the background, by tenant and id, and stored ones."""

    def __init__(
        self, store: ResponseStore, tenant: str, in_progress: Mapping[tuple[str, str], FinishedResponse]
    ) -> None:
        self._store = store
        self._tenant = tenant
        self._in_progress = in_progress

    @property
    def is_enabled(self) -> bool:
        return self._store.is_enabled

    def get(self, response_id: str) -> FinishedResponse | None:
        return self._in_progress.get((self._tenant, response_id)) or self._store.get(self._tenant, response_id)

    def conversation(self, response_id: str) -> list[Raw] | None:
        """The input and output items of a response. None if it is not stored.

        Raises `InvalidRequest` for one in progress.
        """
        response = self.get(response_id)
        if response is not None and response.is_running:
            text = f"the response {response_id} is in progress: it can be continued when it has ended"
            raise InvalidRequest(text, param="previous_response_id", code="response_in_progress")
        return None if response is None else [*response.input, *response.output.values()]

    def item(self, item_id: str) -> Raw | None:
        """An item of a stored response's output. None if there is none."""
        response = self.get(response_id_of(item_id))
        return None if response is None else response.output.get(item_id)

    def keep(self, response: FinishedResponse) -> None:
        """Store a response. Its items are copied: they are views of request bodies, which would stay in memory.

        An item that several responses share counts once for each of them.
        """
        response = msgspec.structs.replace(response, input=tuple(item.copy() for item in response.input))
        items = (*response.input, *response.output.values())
        num_bytes = (
            len(response.body)
            + (0 if response.kept is None else response.kept.num_bytes)
            + sum(len(bytes(item)) for item in items)
            + OBJECT_BYTES * (len(items) + 1)
        )
        self._store.put(self._tenant, response.id, response, num_bytes)

    def delete(self, response_id: str) -> None:
        self._store.pop(self._tenant, response_id)

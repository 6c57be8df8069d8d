"""The names that requests may use for upstreams' models, each with what is known of it at the moment.

Says nothing of who may use them, and asks nobody: how upstreams do and what they list was found out by their checks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from brlite.proxy.forwarder import Forwarder
from brlite.proxy.routing.route_table import Route


class ForwardedModel(msgspec.Struct, frozen=True):
    """One name, and `model`, to which it leads: itself, unless it is an alias.

    `created`, `owned_by` and `max_model_len` are what its upstreams say, where they do.
    """

    name: str
    model: str
    num_upstreams: int
    num_available: int
    created: int
    owned_by: str | None
    max_model_len: int | None


class Catalog:
    """Iterating gives every name as it is then, also after the forwarder's config was replaced."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._started = int(time.time())

    def __iter__(self) -> Iterator[ForwardedModel]:
        now, table = self._forwarder.loop.time(), self._forwarder.table
        for name in table.names():
            target = table.find(name)
            assert target is not None  # it is one of the table's names
            yield self._model(name, target, now)

    def _model(self, name: str, target: Route, now: float) -> ForwardedModel:
        available = [upstream for upstream in target.upstreams if upstream.is_up(now)]
        listed = [
            upstream.listed[target.name_at(upstream)]
            for upstream in available
            if target.name_at(upstream) in upstream.listed
        ]
        return ForwardedModel(
            name=name,
            model=target.model,
            num_upstreams=len(target.upstreams),
            num_available=len(available),
            created=next((model.created for model in listed if model.created is not None), self._started),
            owned_by=next((model.owned_by for model in listed if model.owned_by is not None), None),
            # Any of them may get the next request: what fits into the smallest fits.
            max_model_len=min(
                (model.max_model_len for model in listed if model.max_model_len is not None), default=None
            ),
        )

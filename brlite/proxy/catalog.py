"""The names that requests may use for upstreams' models, each with its state.

Checks no keys and sends no requests: the health checks update the state of upstreams and their model lists.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from brlite.proxy.forwarder import Forwarder


class ForwardedModel(msgspec.Struct, frozen=True):
    """One name, and the `model` it stands for: itself, unless it is an alias.

    `created`, `owned_by` and `max_model_len` come from its upstreams' model lists. If no list has the value,
    `created` is this server's start and the others are None.
    """

    name: str
    model: str
    num_upstreams: int
    num_available: int
    created: int
    owned_by: str | None
    max_model_len: int | None


class Catalog:
    """Iterating gives every name in its current state, also after the forwarder's config was replaced."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._started = int(time.time())

    def __iter__(self) -> Iterator[ForwardedModel]:
        now, table = self._forwarder.loop.time(), self._forwarder.table
        for name, route in table.names():
            available = [upstream for upstream in route.upstreams if upstream.is_up(now)]
            names = [(upstream, route.name_at(upstream)) for upstream in available]
            listed = [upstream.listed[name_there] for upstream, name_there in names if name_there in upstream.listed]
            yield ForwardedModel(
                name=name,
                model=route.model,
                num_upstreams=len(route.upstreams),
                num_available=len(available),
                created=next((model.created for model in listed if model.created is not None), self._started),
                owned_by=next((model.owned_by for model in listed if model.owned_by is not None), None),
                # Any of them may get the next request, so the smallest limit holds.
                max_model_len=min(
                    (model.max_model_len for model in listed if model.max_model_len is not None), default=None
                ),
            )

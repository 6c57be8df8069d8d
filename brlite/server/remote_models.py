"""Models that other servers answer for, as far as this room speaks of them: in `/v1/models` and in `/ready`.

Which they are and how they do is given by `app.py`; how requests reach them is not known here.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import UNSET

from brlite.errors import ModelNotFound
from brlite.server.protocol import ModelCard


class RemoteModel(Protocol):
    """A name that requests may use, and what is known of the model to which it leads."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str:
        """What keys call it: the name itself, unless that is an alias."""

    @property
    def num_upstreams(self) -> int: ...

    @property
    def num_available(self) -> int:
        """How many of them can be reached now."""

    @property
    def created(self) -> int: ...

    @property
    def owned_by(self) -> str | None: ...

    @property
    def max_model_len(self) -> int | None: ...


def forwarded_card(model: RemoteModel) -> ModelCard:
    """What `/v1/models` says of a model. Raises `ModelNotFound` if it cannot be reached now."""
    if not model.num_available:
        text = f"The model `{model.name}` cannot be reached now: no server that has it answers"
        raise ModelNotFound(text, param="model", code="model_not_found")
    return ModelCard(
        id=model.name,
        created=model.created,
        owned_by=model.owned_by or "brlite",
        root=model.model,
        max_model_len=UNSET if model.max_model_len is None else model.max_model_len,
        status="ready",
    )


def forwarded_progress(model: RemoteModel) -> dict[str, object]:
    """What `/ready` says of a model."""
    return {"model": model.name, "upstreams": model.num_upstreams, "available": model.num_available}

"""What `/v1/models` and `/ready` say of models, those of this server and those of others.

How requests reach the others is not known here.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from brlite.errors import ModelNotFound
from brlite.server.served_model import RemoteModel, ServedModel


class ModelCard(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "brlite"
    root: str
    parent: str | None = None
    max_model_len: int | UnsetType = UNSET
    status: str


class ModelList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def local_card(name: str, model: ServedModel) -> ModelCard:
    """What `/v1/models` says of a model of this server under one of its names."""
    return ModelCard(
        id=name,
        created=model.created,
        root=model.name,
        max_model_len=model.max_model_len or UNSET,
        status=model.status,
    )


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

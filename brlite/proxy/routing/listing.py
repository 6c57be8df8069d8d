"""Reads what an upstream reports about its models: its `/v1/models`, and a 404 for a missing model.

Decodes only; does no I/O.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec

from brlite.dialects.json_body import DECODE_ERRORS
from brlite.errors import UpstreamError

MODELS_PATH = "/v1/models"
MAX_LIST_BYTES = 1024 * 1024


class ListedModel(msgspec.Struct, frozen=True):
    """One model, by the upstream's name for it. None: not reported."""

    id: str
    created: int | None = None
    owned_by: str | None = None
    max_model_len: int | None = None


class _List(msgspec.Struct):
    data: list[ListedModel]


class Listing(NamedTuple):
    """Which of some names are in a list, and which are missing."""

    models: Mapping[str, ListedModel]
    missing: frozenset[str]


class _Error(msgspec.Struct):
    """An error in OpenAI's form, or flat as in vLLM's first versions."""

    error: _Error | str | None = None
    code: object = None
    param: object = None
    message: object = None


_LIST = msgspec.json.Decoder(_List, strict=False)
_ERROR = msgspec.json.Decoder(_Error)


def read_list(body: bytes, names: Collection[str]) -> Listing:
    """Look up these names in the list. Raises `UpstreamError` if it is not a list of models.

    In an empty list none is missing: some servers load models on demand. `NAME:latest` is Ollama's name for `NAME`.
    """
    try:
        models = _LIST.decode(body).data
    except DECODE_ERRORS as error:
        raise UpstreamError(f"its list of models cannot be read: {type(error).__name__}") from None
    by_id = {model.id: model for model in models}
    found = {name: model for name in names if (model := by_id.get(name) or by_id.get(f"{name}:latest"))}
    return Listing(found, frozenset(names) - found.keys() if by_id else frozenset())


def says_no_model(body: bytes, name: str) -> bool:
    """Whether the body of a 404 is about the model of that name, not about the path."""
    try:
        error = _ERROR.decode(body)
    except DECODE_ERRORS:
        return False
    if isinstance(error.error, _Error):
        error = error.error
    message = error.error if isinstance(error.error, str) else error.message
    return "model_not_found" in (error.code, error.message) or error.param == "model" or name in str(message or "")

"""What an upstream's own `/v1/models` says of the models that it serves. Decodes; asks nobody."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from brlite.errors import UpstreamError


class ListedModel(msgspec.Struct, frozen=True):
    """One model, by the upstream's name for it. What a server does not say is None."""

    id: str
    created: int | None = None
    owned_by: str | None = None
    max_model_len: int | None = None


class _List(msgspec.Struct):
    data: list[ListedModel]


_LIST = msgspec.json.Decoder(_List, strict=False)


def read_list(body: bytes, names: Collection[str]) -> dict[str, ListedModel]:
    """Those of the list that are among `names`. Raises `UpstreamError` for what is no list of models."""
    try:
        models = _LIST.decode(body).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamError(f"its list of models cannot be read: {type(error).__name__}") from None
    return {model.id: model for model in models if model.id in names}

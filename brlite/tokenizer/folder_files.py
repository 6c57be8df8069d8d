"""The small JSON files of a model folder that say something of its tokens. Knows no vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from brlite.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_eos_token_ids(folder: Path, *others: int | None) -> list[int]:
    """Every id that ends a completion: as the generation config and the model's config name them, then `others`."""
    token_ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in values):
            raise ModelError(f"{folder / name}: eos_token_id must be a token id or a list of them, got {value!r}")
        token_ids += values
    return [*token_ids, *(token_id for token_id in others if token_id is not None)]

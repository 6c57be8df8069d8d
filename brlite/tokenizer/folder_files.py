"""The small JSON files of a model folder that say something of its tokens. Knows no vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brlite.checkpoint.model_file import exists, read_json_object
from brlite.errors import ModelError
from brlite.files.quoting import excerpt


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_json_object(path) if exists(path) else {}


def read_eos_token_ids(folder: Path, *others: int | None) -> list[int]:
    """Every id that ends a completion: as the generation config and the model's config name them, then `others`."""
    token_ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in values):
            raise ModelError(f"{folder / name}: eos_token_id must be token ids, got {excerpt(value)}")
        token_ids += values
    return [*token_ids, *(token_id for token_id in others if token_id is not None)]

"""The sampling values that a model's files recommend: `generation_config.json`, or `general.sampling.*` of a GGUF file.

They are returned unchecked; `llm/loading.py` checks them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brlite.checkpoint.folder import find_weights, has_weights
from brlite.checkpoint.gguf_header import GGUF_KEYS, read_gguf_header
from brlite.checkpoint.model_file import exists, read_json_object

GENERATION_CONFIG = "generation_config.json"


def read_recommended_sampling(path: Path) -> dict[str, Any]:
    """The values by the names of `GGUF_KEYS`; empty if the files have none. A null counts as none.

    Raises `ModelError` for a file that cannot be read.
    """
    if path.is_dir() and exists(path / GENERATION_CONFIG):
        found = read_json_object(path / GENERATION_CONFIG)
    else:
        weights = None if path.is_dir() and not has_weights(path) else find_weights(path)
        if weights is None or weights.kind != "gguf":
            return {}
        metadata = read_gguf_header(weights.files[0]).metadata
        found = {name: metadata.get(key) for name, key in GGUF_KEYS.items()}
    return {name: found[name] for name in GGUF_KEYS if found.get(name) is not None}

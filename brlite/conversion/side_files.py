"""The small files that a bundle takes over from a model: config, tokenizer, chat template. By name; never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brlite.checkpoint.folder import CONFIG_FILE, find_weights, has_weights
from brlite.checkpoint.gguf_header import read_gguf_metadata
from brlite.checkpoint.hub import COMPANION_FILES
from brlite.errors import ModelError
from brlite.files.quoting import reason

VOCABULARY_FILE = "vocabulary.gguf"  # of a GGUF file's tokenizer, which is in its metadata
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def read_side_files(model: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """File name → content, from a model's folder or `.gguf` file. Raises `ModelError` for what cannot be read.

    A GGUF file's config is `config`, which was read from it, whatever stands beside it.
    """
    files = [model / name for name in (*COMPANION_FILES, VOCABULARY_FILE)] if model.is_dir() else []
    weights = find_weights(model) if not model.is_dir() or has_weights(model) else None
    try:
        side_files = {file.name: file.read_bytes() for file in files if file.is_file()}
        if weights is not None and weights.kind == "gguf":
            side_files[CONFIG_FILE] = json.dumps(config, indent=1).encode()
            if not any(name in side_files for name in TOKENIZER_FILES):
                side_files[VOCABULARY_FILE] = read_gguf_metadata(weights.files[0])
    except OSError as error:
        raise ModelError(f"{model}: cannot be read: {reason(error)}") from error
    return side_files

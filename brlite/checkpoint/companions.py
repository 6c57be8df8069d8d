"""The small files that a bundle takes over from a model: config, tokenizer, chat template. By name; never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brlite.checkpoint.checkpoint import reason
from brlite.checkpoint.folder import CONFIG_FILE, find_weights
from brlite.checkpoint.gguf_header import read_gguf_metadata
from brlite.checkpoint.hub import COMPANION_FILES
from brlite.errors import ModelError

VOCABULARY_FILE = "vocabulary.gguf"  # of a GGUF file's tokenizer, which is in its metadata
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def read_companions(model: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """File name → content, from a model's folder or `.gguf` file. Raises `ModelError` for what cannot be read."""
    folder = model if model.is_dir() else model.parent
    files = [folder / name for name in COMPANION_FILES] if model.is_dir() else []
    try:
        companions = {file.name: file.read_bytes() for file in files if file.is_file()}
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if CONFIG_FILE not in companions:
        companions[CONFIG_FILE] = json.dumps(config, indent=1).encode()
    if not any(name in companions for name in TOKENIZER_FILES):
        companions |= _gguf_vocabulary(model)
    return companions


def _gguf_vocabulary(model: Path) -> dict[str, bytes]:
    try:
        weights = find_weights(model)
        return {VOCABULARY_FILE: read_gguf_metadata(weights.files[0])} if weights.kind == "gguf" else {}
    except OSError as error:
        raise ModelError(f"{model}: cannot be read: {reason(error)}") from error

"""Reads a folder of safetensors, one file or several shards, with numpy alone. Reads nothing ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brlite.checkpoint.checkpoint import weights_identity
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.safetensors_header import read_headers
from brlite.checkpoint.stored_tensor import (
    ALLOWED_DTYPES,
    PLAIN_FORMATS,
    StoredTensor,
    TensorLocation,
    tensors_in_files,
)
from brlite.errors import ModelError
from brlite.files.quoting import excerpt


class SafetensorsCheckpoint:
    """Implements `Checkpoint`. Opening it checks all headers."""

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        headers = read_headers(files)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[Path, list[TensorLocation]] = {}
        for file, header in headers.items():
            for entry in header.entries:
                if entry.dtype not in PLAIN_FORMATS:
                    found = f"{excerpt(entry.name)} has dtype {excerpt(entry.dtype)}"
                    raise ModelError(f"{file}: {found}; allowed are {ALLOWED_DTYPES}")
                self._shapes[entry.name] = entry.shape
            self._files[file] = [
                TensorLocation(entry.name, PLAIN_FORMATS[entry.dtype], entry.shape, entry.begin)
                for entry in header.entries
            ]
        self.num_bytes = sum(header.num_bytes for header in headers.values())
        self.identity = weights_identity(self.config, {file: header.raw for file, header in headers.items()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def formats(self) -> dict[str, str]:
        return {location.name: location.format.name for locations in self._files.values() for location in locations}

    def tensors(self) -> Iterator[StoredTensor]:
        return tensors_in_files(self._files)

"""A folder of safetensors, in one file or in shards, read with numpy alone. Nothing is read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from brlite.checkpoint.checkpoint import read_header, weights_identity
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.safetensors_header import SafetensorsHeader, read_safetensors_header
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
    """Implements `Checkpoint`. All headers are checked when it is opened."""

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
                TensorLocation(entry.name, PLAIN_FORMATS[entry.dtype], entry.shape, header.data_start + entry.begin)
                for entry in header.entries
            ]
        self.num_bytes = sum(header.entries[-1].end for header in headers.values() if header.entries)
        raw = {file: read_header(file, header.data_start) for file, header in headers.items()}
        self.identity = weights_identity(self.config, raw)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def formats(self) -> dict[str, str]:
        return {location.name: location.format.name for locations in self._files.values() for location in locations}

    def tensors(self) -> Iterator[StoredTensor]:
        return tensors_in_files(self._files)

    def close(self) -> None:
        """Nothing is kept open but while tensors are read."""


def read_headers(files: Sequence[Path]) -> dict[Path, SafetensorsHeader]:
    """The headers of a model's shards. Raises `ModelError` where two hold the same tensor."""
    headers = {file: read_safetensors_header(file) for file in files}
    names: set[str] = set()
    for file, header in headers.items():
        for entry in header.entries:
            if entry.name in names:
                raise ModelError(f"{file}: holds {excerpt(entry.name)}, which an earlier shard holds too")
            names.add(entry.name)
    return headers

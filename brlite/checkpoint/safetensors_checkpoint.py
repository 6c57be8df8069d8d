"""A folder of safetensors, in one file or in shards, read with numpy alone. Nothing is read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from brlite.checkpoint.checkpoint import excerpt, reason
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.identity import read_header, weights_identity
from brlite.checkpoint.safetensors_header import SafetensorsHeader, read_safetensors_header
from brlite.checkpoint.stored_numbers import Float32, read_float32
from brlite.errors import ModelError


class SafetensorsCheckpoint:
    """Implements `Checkpoint`. All headers are checked when it is opened."""

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        self._headers = {file: read_safetensors_header(file) for file in files}
        self._shapes = _collect_shapes(self._headers)
        self.num_bytes = sum(header.entries[-1].end for header in self._headers.values() if header.entries)
        raw = {file: read_header(file, header.data_start) for file, header in self._headers.items()}
        self.identity = weights_identity(self.config, raw)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def tensors(self) -> Iterator[tuple[str, Float32]]:
        for file, header in self._headers.items():
            try:
                with file.open("rb") as stream:
                    for entry in header.entries:
                        begin = header.data_start + entry.begin
                        yield entry.name, read_float32(stream, begin, entry.shape, entry.dtype)
            except OSError as error:
                raise ModelError(f"{file}: {reason(error)}") from error

    def close(self) -> None:
        """Nothing is kept open between two tensors' files."""


def _collect_shapes(headers: Mapping[Path, SafetensorsHeader]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file, header in headers.items():
        for entry in header.entries:
            if entry.name in shapes:
                raise ModelError(f"{file}: holds {excerpt(entry.name)}, which an earlier shard holds too")
            shapes[entry.name] = entry.shape
    return shapes

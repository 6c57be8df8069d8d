"""A folder of safetensors, in one file or in shards. Files are mapped one at a time; nothing is read ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from brlite.checkpoint.checkpoint import excerpt, reason
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.safetensors_header import TensorEntry, read_safetensors_header
from brlite.errors import ModelError

if TYPE_CHECKING:
    import torch


class SafetensorsCheckpoint:
    """Implements `Checkpoint`. All headers are checked when it is opened."""

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        self._entries = {file: read_safetensors_header(file) for file in files}
        self._shapes = _collect_shapes(self._entries)
        self.num_bytes = sum(entries[-1].end for entries in self._entries.values() if entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file, entries in self._entries.items():
            try:
                with safe_open(file, framework="pt", device="cpu") as shard:
                    for entry in entries:
                        yield entry.name, shard.get_tensor(entry.name)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: {reason(error)}") from error

    def close(self) -> None:
        """Nothing is kept open between two tensors' files."""


def _collect_shapes(entries: dict[Path, list[TensorEntry]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file, shard in entries.items():
        for entry in shard:
            if entry.name in shapes:
                raise ModelError(f"{file}: holds {excerpt(entry.name)}, which an earlier shard holds too")
            shapes[entry.name] = entry.shape
    return shapes

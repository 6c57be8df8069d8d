"""A folder of safetensors, in one file or in shards, read with numpy alone. Nothing is read ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from brlite.checkpoint.checkpoint import read_header, weights_identity
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.safetensors_header import SafetensorsHeader, TensorEntry, read_safetensors_header
from brlite.checkpoint.slices import Cuts, Slice
from brlite.checkpoint.stored_numbers import STORED, Float32, read_columns, read_float32
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

T = TypeVar("T")


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
        return self._each(_read_whole)

    def cuts(self, wanted: Cuts) -> Iterator[tuple[str, Slice, Float32]]:
        """What is `wanted` of each tensor. Of other rows nothing is read, of other columns nothing is kept."""

        def read(stream: BufferedReader, begin: int, entry: TensorEntry) -> Iterator[tuple[str, Slice, Float32]]:
            for cut in wanted.get(entry.name, ()):
                yield entry.name, cut, _read_cut(stream, begin, entry, cut)

        return self._each(read)

    def close(self) -> None:
        """Nothing is kept open between two tensors' files."""

    def _each(self, read: Callable[[BufferedReader, int, TensorEntry], Iterator[T]]) -> Iterator[T]:
        """What `read` makes of every tensor, given its file and the byte where it begins there."""
        for file, header in self._headers.items():
            try:
                with file.open("rb") as stream:
                    for entry in header.entries:
                        yield from read(stream, header.data_start + entry.begin, entry)
            except OSError as error:
                raise ModelError(f"{file}: {reason(error)}") from error


def _read_whole(stream: BufferedReader, begin: int, entry: TensorEntry) -> Iterator[tuple[str, Float32]]:
    yield entry.name, read_float32(stream, begin, entry.shape, entry.dtype)


def _read_cut(stream: BufferedReader, begin: int, entry: TensorEntry, cut: Slice) -> Float32:
    row_shape = entry.shape[1:]
    first = begin + cut.rows.start * math.prod(row_shape) * STORED[entry.dtype][0]
    if cut.columns is None:
        return read_float32(stream, first, (len(cut.rows), *row_shape), entry.dtype)
    return read_columns(stream, first, (len(cut.rows), *row_shape), entry.dtype, cut.columns)


def _collect_shapes(headers: Mapping[Path, SafetensorsHeader]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file, header in headers.items():
        for entry in header.entries:
            if entry.name in shapes:
                raise ModelError(f"{file}: holds {excerpt(entry.name)}, which an earlier shard holds too")
            shapes[entry.name] = entry.shape
    return shapes

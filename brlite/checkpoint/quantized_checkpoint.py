"""Reads a folder of safetensors with quantized matrices as a plain checkpoint: one tensor for each matrix.

`quantized_matrix.py` has the layouts of the matrices. Reads one matrix at a time, and nothing ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from brlite.checkpoint.checkpoint import naming, weights_identity
from brlite.checkpoint.quantization import Quantization, read_quantization, without_quantization
from brlite.checkpoint.quantized_matrix import LAYOUTS, SCALES, Array, QuantizedMatrix
from brlite.checkpoint.safetensors import TensorEntry, read_headers
from brlite.checkpoint.stored_tensor import (
    ALLOWED_DTYPES,
    PLAIN_FORMATS,
    StoredTensor,
    TensorLocation,
    check_unchanged,
    make_tensor,
    read_bytes,
)
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

logger = logging.getLogger(__name__)

INTEGER_TYPES = {"I32": "<i4", "I64": "<i8", "I8": "i1", "F8_E4M3": "u1"}  # in numpy; floats become float32
# Scales and zero points of activations, attention and KV caches. brlite does not use them.
UNUSED_SUFFIXES = tuple(
    f".{of}_{part}" for of in ("input", "output", "q", "k", "v") for part in ("scale", "zero_point")
)


class QuantizedCheckpoint:
    """Implements `Checkpoint`. Opening it checks all headers. `config` is that of the plain model."""

    def __init__(self, path: Path, files: tuple[Path, ...], config: Mapping[str, Any]) -> None:
        self.path = path
        self.config: dict[str, Any] = without_quantization(config)
        quantization = read_quantization(config)
        assert quantization is not None, "a folder that is not quantized"
        headers = read_headers(files)
        self.num_bytes = sum(header.num_bytes for header in headers.values())
        self.identity = weights_identity(config, {file: header.raw for file, header in headers.items()})
        self._written_ns = {file: file.stat().st_mtime_ns for file in files}
        entries = {entry.name: entry for header in headers.values() for entry in header.entries}
        self._entries = {name: entry for name, entry in entries.items() if not name.endswith(UNUSED_SUFFIXES)}
        self._num_unused = len(entries) - len(self._entries)
        with naming(path):
            self._matrices = _find_matrices(quantization, self._entries)
        taken = {part.name for _, parts in self._matrices.values() for part in parts.values()}
        self._plain = {name: entry for name, entry in self._entries.items() if name not in taken}
        for name, entry in self._plain.items():
            if entry.dtype not in PLAIN_FORMATS:
                raise ModelError(
                    f"{entry.file}: {excerpt(name)} has dtype {excerpt(entry.dtype)}; allowed are "
                    f"{ALLOWED_DTYPES}, and the tensors of a matrix quantized by {quantization.method}"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        plain = {name: entry.shape for name, entry in self._plain.items()}
        return plain | {matrix.name: matrix.shape for matrix, _ in self._matrices.values()}

    def formats(self) -> dict[str, str]:
        plain = {name: entry.dtype for name, entry in self._plain.items()}
        return plain | {matrix.name: matrix.format.name for matrix, _ in self._matrices.values()}

    def tensors(self) -> Iterator[StoredTensor]:
        if self._num_unused:
            logger.info("%s: %d scales of activations and caches are not used", self.path.name, self._num_unused)
        with ExitStack() as opened:
            streams: dict[Path, BufferedReader] = {}
            for file in self._written_ns:
                try:
                    streams[file] = opened.enter_context(file.open("rb"))
                except OSError as error:
                    raise ModelError(f"{file}: {reason(error)}") from error
            num_rounded = 0
            for name, entry in self._entries.items():
                if name in self._plain:
                    location = TensorLocation(name, PLAIN_FORMATS[entry.dtype], entry.shape)
                    yield make_tensor(location, partial(read_bytes, streams[entry.file], entry.begin))
                elif name in self._matrices:
                    matrix, parts = self._matrices[name]
                    arrays = {part: _read_array(streams[place.file], place) for part, place in parts.items()}
                    with naming(self.path):
                        tensor = matrix.tensor(arrays)
                    yield tensor
                    del tensor
                    if matrix.format.decode is not None:
                        (scales,) = (arrays[part] for part in SCALES if part in arrays)
                        num_rounded += int((scales.astype(np.float16).astype(np.float32) != scales).sum())
                    del arrays  # before the next one is read
            for file, written_ns in self._written_ns.items():
                check_unchanged(streams[file], written_ns)
            if num_rounded:
                note = "%s: %d scales are rounded to half precision where codes are kept"
                logger.info(note, self.path.name, num_rounded)


def _read_array(stream: BufferedReader, entry: TensorEntry) -> Array:
    data = read_bytes(stream, entry.begin, 0, entry.end - entry.begin)
    is_float = entry.dtype in PLAIN_FORMATS
    values = PLAIN_FORMATS[entry.dtype].widen(data) if is_float else data.view(INTEGER_TYPES[entry.dtype])
    return values.reshape(entry.shape)


def _find_matrices(
    quantization: Quantization, entries: Mapping[str, TensorEntry]
) -> dict[str, tuple[QuantizedMatrix, dict[str, TensorEntry]]]:
    """Each quantized matrix with the headers of its tensors, by the name of the tensor that holds its codes."""
    found: dict[str, tuple[QuantizedMatrix, dict[str, TensorEntry]]] = {}
    for layout in LAYOUTS[quantization.method]:
        (codes, dtypes), *_ = layout.tensors.items()
        for name, entry in entries.items():
            module, _, part = name.rpartition(".")
            if part != codes or entry.dtype not in dtypes:
                continue
            parts = {part: entries[f"{module}.{part}"] for part in layout.tensors if f"{module}.{part}" in entries}
            matrix = layout(f"{module}.weight", quantization, parts)
            if matrix.name in entries and matrix.name != name:
                raise ModelError(f"{excerpt(matrix.name)} is there both plain and quantized")
            found[name] = matrix, parts
    return found

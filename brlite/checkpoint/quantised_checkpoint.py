"""A folder of safetensors whose matrices a tool has quantised, as a plain checkpoint: one tensor for each matrix.

What they hold is in `quantised_matrix.py`. Nothing is read before it is asked for, and then one matrix at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from brlite.checkpoint.checkpoint import read_header, weights_identity
from brlite.checkpoint.quantised_matrix import NUMPY_TYPES, TENSORS, Array, QuantisedMatrix, num_rounded
from brlite.checkpoint.quantization import Quantization, read_quantization, without_quantization
from brlite.checkpoint.safetensors_checkpoint import read_headers
from brlite.checkpoint.safetensors_header import TensorEntry
from brlite.checkpoint.stored_tensor import (
    ALLOWED_DTYPES,
    PLAIN_FORMATS,
    StoredTensor,
    TensorLocation,
    make_tensor,
    read_bytes,
)
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

logger = logging.getLogger(__name__)

# Scales and zero points of activations, attention and KV caches: none of those is quantised by them here.
UNUSED_SUFFIXES = (
    *(f".{of}_scale" for of in ("input", "output", "q", "k", "v")),
    *(f".{of}_zero_point" for of in ("input", "output", "q", "k", "v")),
)
KINDS: dict[str, tuple[str, ...]] = {"compressed-tensors": ("packed", "int8")}  # of TENSORS, by method


class Place(NamedTuple):
    """A tensor and where it is."""

    file: Path
    data_start: int
    entry: TensorEntry


class QuantisedCheckpoint:
    """Implements `Checkpoint`. All headers are checked when it is opened. `config` is that of the plain model."""

    def __init__(self, path: Path, files: tuple[Path, ...], config: Mapping[str, Any]) -> None:
        self.path = path
        self.config: dict[str, Any] = without_quantization(config)
        quantization = read_quantization(config)
        assert quantization is not None, "a folder that is not quantised"
        headers = read_headers(files)
        self._files = files
        self._places = places = {
            entry.name: Place(file, header.data_start, entry)
            for file, header in headers.items()
            for entry in header.entries
        }
        self._unused = sorted(name for name in places if name.endswith(UNUSED_SUFFIXES))
        for name in self._unused:
            del places[name]  # which the model has no use for
        try:
            self._matrices = _find_matrices(quantization, places)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        taken = {part.entry.name for _, parts in self._matrices.values() for part in parts.values()}
        self._plain = {name: place for name, place in places.items() if name not in taken}
        for name, place in self._plain.items():
            if place.entry.dtype not in PLAIN_FORMATS:
                raise ModelError(
                    f"{place.file}: {excerpt(name)} has dtype {excerpt(place.entry.dtype)}; allowed are "
                    f"{ALLOWED_DTYPES}, and the tensors of a matrix quantised by {quantization.method}"
                )
        self.num_bytes = sum(header.entries[-1].end for header in headers.values() if header.entries)
        self.identity = weights_identity(
            config, {file: read_header(file, header.data_start) for file, header in headers.items()}
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        plain = {name: place.entry.shape for name, place in self._plain.items()}
        return plain | {matrix.name: matrix.shape for matrix, _ in self._matrices.values()}

    def formats(self) -> dict[str, str]:
        plain = {name: place.entry.dtype for name, place in self._plain.items()}
        return plain | {matrix.name: matrix.format.name for matrix, _ in self._matrices.values()}

    def tensors(self) -> Iterator[StoredTensor]:
        if self._unused:
            logger.info("%s: %d scales of activations and caches are not used", self.path.name, len(self._unused))
        with ExitStack() as opened:
            streams: dict[Path, BufferedReader] = {}
            for file in self._files:
                try:
                    streams[file] = opened.enter_context(file.open("rb"))
                except OSError as error:
                    raise ModelError(f"{file}: {reason(error)}") from error
            num_scales = 0
            for name, (file, data_start, entry) in self._places.items():
                if name in self._plain:
                    location = TensorLocation(name, PLAIN_FORMATS[entry.dtype], entry.shape, data_start + entry.begin)
                    yield make_tensor(location, partial(read_bytes, streams[file], location.begin))
                elif name in self._matrices:
                    matrix, parts = self._matrices[name]
                    arrays = {part: _read_array(streams[place.file], place) for part, place in parts.items()}
                    try:
                        yield matrix.tensor(arrays, {part: place.entry.dtype for part, place in parts.items()})
                    except ModelError as error:
                        raise ModelError(f"{self.path}: {error}") from error
                    if matrix.format.decode is not None:
                        (scale,) = arrays.keys() & {"scales", "weight_scale"}
                        num_scales += num_rounded(arrays[scale], parts[scale].entry.dtype)
                    del arrays  # before the next one is read
            if num_scales:
                logger.info("%s: native kernels round %d scales to half precision", self.path.name, num_scales)

    def close(self) -> None:
        """Nothing is kept open but while tensors are read."""


def _read_array(stream: BufferedReader, place: Place) -> Array:
    entry = place.entry
    data = read_bytes(stream, place.data_start + entry.begin, 0, entry.end - entry.begin)
    return data.view(NUMPY_TYPES[entry.dtype]).reshape(entry.shape)


def _find_matrices(
    quantization: Quantization, places: Mapping[str, Place]
) -> dict[str, tuple[QuantisedMatrix, dict[str, Place]]]:
    """The quantised matrices, checked, with their tensors: by the name of the first of these."""
    kinds = KINDS.get(quantization.method, (quantization.method,))
    found: dict[str, tuple[QuantisedMatrix, dict[str, Place]]] = {}
    for kind in kinds:
        (first, dtypes), *_ = TENSORS[kind].items()
        for name, place in places.items():
            module, _, part = name.rpartition(".")
            if part != first or place.entry.dtype not in dtypes:
                continue
            parts = {part: places[f"{module}.{part}"] for part in TENSORS[kind] if f"{module}.{part}" in places}
            shapes = {part: place.entry.shape for part, place in parts.items()}
            matrix = QuantisedMatrix(f"{module}.weight", kind, quantization, shapes)
            matrix.check({part: place.entry.dtype for part, place in parts.items()})
            if matrix.name in places and matrix.name != name:
                raise ModelError(f"{excerpt(matrix.name)} is there both plain and quantised")
            found[name] = matrix, parts
    return found

"""The weights of a traced `.pt` as a checkpoint. The config comes from the model's folder; the graph is not used.

The archive's tensors have Hugging Face's names, since they are named by the modules that were traced. Its buffers
(rotary tables, masks) are left out: they follow from the config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from brlite.checkpoint.checkpoint import weights_identity
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.safetensors_header import ITEM_BYTES
from brlite.checkpoint.stored_numbers import Float32, read_float32
from brlite.checkpoint.traced_archive import TracedArchive, TracedTensor
from brlite.checkpoint.traced_code import class_text, parameter_names
from brlite.errors import ModelError
from brlite.files.quoting import reason


class TracedCheckpoint:
    """Implements `Checkpoint`. Its `path` is the file's; the config is read from the folder."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.path = file
        self.config: dict[str, Any] = read_config(folder)
        archive = TracedArchive(file)
        self._tensors = place_parameters(archive)
        self.num_bytes = sum(tensor.num_elements * ITEM_BYTES[tensor.dtype] for tensor in self._tensors.values())
        self.identity = weights_identity(self.config, {file: archive.pickle})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, Float32]]:
        try:
            with self.path.open("rb") as stream:
                for name, tensor in self._tensors.items():
                    yield name, _read(stream, tensor)
        except OSError as error:
            raise ModelError(f"{self.path}: {reason(error)}") from error

    def close(self) -> None:
        """Nothing is kept open but while tensors are read."""


def place_parameters(archive: TracedArchive) -> dict[str, TracedTensor]:
    """Every parameter of the traced module by its name, and where it is in the file."""
    known: dict[str, frozenset[str]] = {}
    places = {}
    with archive.file.open("rb") as stream:
        for name, owner, value in archive.tensors():
            if owner.type_name not in known:
                text = class_text(archive.source(owner.type_name), owner.type_name)
                known[owner.type_name] = parameter_names(text)
            if name.rpartition(".")[2] in known[owner.type_name]:
                places[name] = archive.place(stream, name, value)
    return places


def _read(stream: BufferedReader, tensor: TracedTensor) -> Float32:
    values = read_float32(stream, tensor.begin, (tensor.num_elements,), tensor.dtype)
    if math.prod(tensor.shape) == 0:
        return values.reshape(tensor.shape)
    strides = [4 * stride for stride in tensor.strides]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, tensor.shape, strides))

"""A GGUF file as a Hugging Face checkpoint: its tensors dequantised to float32, in Hugging Face's names and layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from brlite.checkpoint.checkpoint import read_header, weights_identity
from brlite.checkpoint.gguf_config import ROPE_FREQS, GgufMetadata, hugging_face_config, hugging_face_name
from brlite.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from brlite.checkpoint.stored_numbers import Float32, read_bytes
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

CHUNK_ELEMENTS = 1 << 20  # dequantised at once: the package needs several times its result, here some 20 MB


class GgufCheckpoint:
    """Implements `Checkpoint`. A tensor is read and dequantised when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf_header(path)
        self._data_start = header.data_start
        try:
            self._take_config(header, _checked_tensors(header))
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        self.num_bytes = sum(map(_num_bytes, self._tensors.values()))
        self.identity = weights_identity(self.config, {path: read_header(path, header.data_start)})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, Float32]]:
        try:
            with self.path.open("rb") as stream:
                for name, tensor in self._tensors.items():
                    yield name, self._restore_rows(name, self._dequantise(stream, tensor))
        except OSError as error:
            raise ModelError(f"{self.path}: {reason(error)}") from error

    def close(self) -> None:
        """Nothing is kept open but while tensors are read."""

    def _take_config(self, header: GgufHeader, stored: dict[str, GgufTensor]) -> None:
        metadata = GgufMetadata(header.metadata)
        freqs = stored.pop(ROPE_FREQS, None)
        divisors = None if freqs is None else self._read_divisors(freqs)
        self._tensors = {hugging_face_name(name): tensor for name, tensor in stored.items()}
        self.config: dict[str, Any] = hugging_face_config(metadata, self.shapes(), divisors)
        self._interleaved = _interleaved_heads(metadata.architecture, self.config)
        for name, tensor in self._tensors.items():
            num_heads = self._interleaved.get(_module(name))
            if num_heads is not None and tensor.shape[0] != num_heads * self.config["head_dim"]:
                raise ModelError(f"{tensor.name} must have {num_heads * self.config['head_dim']} rows: {tensor.shape}")

    def _read_divisors(self, tensor: GgufTensor) -> list[float]:
        with self.path.open("rb") as stream:
            return [float(divisor) for divisor in self._dequantise(stream, tensor).flat]

    def _dequantise(self, stream: BufferedReader, tensor: GgufTensor) -> Float32:
        """The tensor in float32, a few rows at a time: memory is the result and little else."""
        num_rows = math.prod(tensor.shape[:-1])
        row_bytes = _num_bytes(tensor) // num_rows
        out = np.empty((num_rows, tensor.shape[-1]), np.float32)
        step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        for start in range(0, num_rows, step):
            rows = out[start : start + step]
            begin = self._data_start + tensor.offset + start * row_bytes
            stored = read_bytes(stream, begin, len(rows) * row_bytes).reshape(len(rows), row_bytes)
            rows[:] = gguf.quants.dequantize(stored, kind)
        return out.reshape(tensor.shape)

    def _restore_rows(self, name: str, tensor: Float32) -> Float32:
        """Undo llama.cpp's order of a head's rows: it pairs neighbours for rope, Hugging Face pairs the two halves."""
        num_heads = self._interleaved.get(_module(name))
        if num_heads is None:
            return tensor
        pairs: Float32 = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])  # [H, D/2, 2, ...]
        return np.swapaxes(pairs, 1, 2).reshape(tensor.shape)  # [H*D, ...]


def _module(name: str) -> str:
    return name.split(".")[-2]


def _interleaved_heads(architecture: str, config: dict[str, Any]) -> dict[str, int]:
    if architecture != "llama":
        return {}
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}


def _num_bytes(tensor: GgufTensor) -> int:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type_id)]
    return math.prod(tensor.shape) // int(block_elements) * int(block_bytes)


def _checked_tensors(header: GgufHeader) -> dict[str, GgufTensor]:
    """The table of tensors in the order of the data, once each lies within the file and is of a type we can read."""
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise ModelError("one part of a split GGUF; merge the parts into one file first")
    for type_id in sorted({tensor.type_id for tensor in header.tensors}):
        _check_type(type_id, next(tensor.name for tensor in header.tensors if tensor.type_id == type_id))
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        if tensor.name in tensors:
            raise ModelError(f"tensor {excerpt(tensor.name)} is listed twice")
        if tensor.offset < end:
            raise ModelError(f"tensor {excerpt(tensor.name)} begins within the one before it")
        end = tensor.offset + _check_place(header, tensor)
        tensors[tensor.name] = tensor
    return tensors


def _check_type(type_id: int, name: str) -> None:
    try:
        kind = gguf.GGMLQuantizationType(type_id)
    except ValueError:
        raise ModelError(f"tensor {excerpt(name)} is of type {type_id}, which the gguf package does not know") from None
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)  # one block: only doing it tells
    except NotImplementedError:
        raise ModelError(f"tensor {excerpt(name)} is of type {kind.name}, which cannot be dequantised") from None


def _check_place(header: GgufHeader, tensor: GgufTensor) -> int:
    """The bytes that a tensor takes, all of which are there."""
    kind = gguf.GGMLQuantizationType(tensor.type_id)
    block_elements = gguf.GGML_QUANT_SIZES[kind][0]
    if 0 in tensor.shape or tensor.shape[-1] % block_elements:
        raise ModelError(f"tensor {excerpt(tensor.name)} has shape {tensor.shape}; {kind.name} needs {block_elements}s")
    end = header.data_start + tensor.offset + _num_bytes(tensor)
    if end > header.num_file_bytes:
        raise ModelError(
            f"truncated: tensor {excerpt(tensor.name)} ends at byte {end}, but the file has {header.num_file_bytes}"
        )
    return _num_bytes(tensor)

"""A GGUF file as a Hugging Face checkpoint: its tensors dequantised to float32, in Hugging Face's names and layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from brlite.checkpoint.checkpoint import excerpt
from brlite.checkpoint.gguf_config import ROPE_FREQS, GgufMetadata, hugging_face_config, hugging_face_name
from brlite.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from brlite.errors import ModelError

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 20  # dequantised at once: the package needs several times its result, here some 20 MB


class GgufCheckpoint:
    """Implements `Checkpoint`. The file is mapped; a tensor is dequantised when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf_header(path)
        try:
            stored = _checked_tensors(header)
            self._data = np.memmap(path, dtype=np.uint8, mode="r")[header.data_start :]
            self._take_config(header, stored)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        self.num_bytes = sum(map(_num_bytes, self._tensors.values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors.items():
            yield name, self._restore_rows(name, self._dequantise(tensor))

    def close(self) -> None:
        """Let go of the mapping."""
        del self._data

    def _take_config(self, header: GgufHeader, stored: dict[str, GgufTensor]) -> None:
        metadata = GgufMetadata(header.metadata)
        freqs = stored.pop(ROPE_FREQS, None)
        divisors = None if freqs is None else self._dequantise(freqs).flatten().tolist()
        self._tensors = {hugging_face_name(name): tensor for name, tensor in stored.items()}
        self.config: dict[str, Any] = hugging_face_config(metadata, self.shapes(), divisors)
        self._interleaved = _interleaved_heads(metadata.architecture, self.config)
        for name, tensor in self._tensors.items():
            num_heads = self._interleaved.get(_module(name))
            if num_heads is not None and tensor.shape[0] != num_heads * self.config["head_dim"]:
                raise ModelError(f"{tensor.name} must have {num_heads * self.config['head_dim']} rows: {tensor.shape}")

    def _dequantise(self, tensor: GgufTensor) -> torch.Tensor:
        """The tensor in float32, a few rows at a time: memory is the result and little else."""
        import torch

        rows = self._data[tensor.offset : tensor.offset + _num_bytes(tensor)].reshape(math.prod(tensor.shape[:-1]), -1)
        out = np.empty((len(rows), tensor.shape[-1]), np.float32)
        step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        for begin in range(0, len(rows), step):
            # Copied by numpy, not torch: torch wakes its threads for each chunk, which takes 3 times as long when busy.
            out[begin : begin + step] = gguf.quants.dequantize(rows[begin : begin + step], kind)
        return torch.from_numpy(out.reshape(tensor.shape))

    def _restore_rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Undo llama.cpp's order of a head's rows: it pairs neighbours for rope, Hugging Face pairs the two halves."""
        num_heads = self._interleaved.get(_module(name))
        if num_heads is None:
            return tensor
        pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])  # [H, D/2, 2, ...]
        return pairs.transpose(1, 2).reshape(tensor.shape)  # [H*D, ...]


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
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        if tensor.name in tensors:
            raise ModelError(f"tensor {excerpt(tensor.name)} is listed twice")
        _check_place(header, tensor)
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


def _check_place(header: GgufHeader, tensor: GgufTensor) -> None:
    kind = gguf.GGMLQuantizationType(tensor.type_id)
    block_elements = gguf.GGML_QUANT_SIZES[kind][0]
    if 0 in tensor.shape or tensor.shape[-1] % block_elements:
        raise ModelError(f"tensor {excerpt(tensor.name)} has shape {tensor.shape}; {kind.name} needs {block_elements}s")
    end = header.data_start + tensor.offset + _num_bytes(tensor)
    if end > header.num_file_bytes:
        raise ModelError(
            f"truncated: tensor {excerpt(tensor.name)} ends at byte {end}, but the file has {header.num_file_bytes}"
        )

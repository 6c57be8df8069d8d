"""Reads a GGUF file as a checkpoint: its tensors as they are stored, with Hugging Face's names and order of rows.

The `gguf` package dequantizes tensors to float32; `gguf_codes.py` unpacks the formats whose codes are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from brlite.checkpoint.checkpoint import naming, weights_identity
from brlite.checkpoint.folder import SPLIT_TEXT
from brlite.checkpoint.gguf_codes import CODINGS
from brlite.checkpoint.gguf_config import ROPE_FREQS, GgufMetadata, hugging_face_config, hugging_face_name
from brlite.checkpoint.gguf_header import GgufHeader, read_gguf_header
from brlite.checkpoint.stored_tensor import PLAIN_FORMATS, Format, LocatedTensors, TensorLocation
from brlite.errors import ModelError
from brlite.files.quoting import excerpt


class GgufCheckpoint(LocatedTensors):
    """Implements `Checkpoint`. A tensor is read only when its numbers or its codes are needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf_header(path)
        with naming(path):
            tensors = checked_tensors(header)
            metadata = GgufMetadata(header.metadata)
            freqs = tensors.pop(ROPE_FREQS, None)
            divisors = None
            if freqs is not None:
                (divisors,) = (
                    tensor.float32().reshape(-1).tolist() for tensor in LocatedTensors({path: [freqs]}).tensors()
                )
            named = {hugging_face_name(name): tensor for name, tensor in tensors.items()}
            shapes = {name: tensor.shape for name, tensor in named.items()}
            self.config: dict[str, Any] = hugging_face_config(metadata, shapes, divisors)
            heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
            interleaved = {"q_proj": heads, "k_proj": kv_heads} if metadata.architecture == "llama" else {}
            for name, tensor in named.items():
                num_heads = interleaved.get(_module(name))
                if num_heads is not None and tensor.shape[0] != num_heads * self.config["head_dim"]:
                    raise ModelError(
                        f"{tensor.name} must have {num_heads * self.config['head_dim']} rows: {tensor.shape}"
                    )
        locations = [
            tensor._replace(name=name, head_rows=self.config["head_dim"] if _module(name) in interleaved else 0)
            for name, tensor in named.items()
        ]
        super().__init__({path: locations})
        with path.open("rb") as stream:
            self.identity = weights_identity(self.config, {path: stream.read(header.data_start)})


def _module(name: str) -> str:
    return name.split(".")[-2]


def checked_tensors(header: GgufHeader) -> dict[str, TensorLocation]:
    """The table of tensors in the order of the data. Raises `ModelError` for one that cannot be read."""
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(SPLIT_TEXT)
    formats = {
        type_id: _format(type_id, next(tensor.name for tensor in header.tensors if tensor.type_id == type_id))
        for type_id in sorted({tensor.type_id for tensor in header.tensors})
    }
    tensors: dict[str, TensorLocation] = {}
    end = header.data_start
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        stored_as, begin = formats[tensor.type_id], header.data_start + tensor.offset
        if tensor.name in tensors:
            raise ModelError(f"tensor {excerpt(tensor.name)} is listed twice")
        if begin < end:
            raise ModelError(f"tensor {excerpt(tensor.name)} begins within the one before it")
        if 0 in tensor.shape or tensor.shape[-1] % stored_as.block_elements:
            wanted = f"{stored_as.name} needs {stored_as.block_elements}s"
            raise ModelError(f"tensor {excerpt(tensor.name)} has shape {tensor.shape}; {wanted}")
        tensors[tensor.name] = location = TensorLocation(tensor.name, stored_as, tensor.shape, begin)
        end = begin + location.num_bytes
        if end > header.num_file_bytes:
            raise ModelError(
                f"truncated: tensor {excerpt(tensor.name)} ends at byte {end}, but the file has {header.num_file_bytes}"
            )
    return tensors


def _format(type_id: int, name: str) -> Format:
    """The format for GGML's type `type_id`. Errors name the tensor `name`, which has this type."""
    try:
        kind = gguf.GGMLQuantizationType(type_id)
    except ValueError:
        raise ModelError(f"tensor {excerpt(name)} is of type {type_id}, which the gguf package does not know") from None
    if kind.name in PLAIN_FORMATS:
        return PLAIN_FORMATS[kind.name]
    block_elements, block_bytes = map(int, gguf.GGML_QUANT_SIZES[kind])
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)  # the package lists no types: try one block
    except NotImplementedError:
        raise ModelError(f"tensor {excerpt(name)} is of type {kind.name}, which cannot be dequantized") from None
    coding = CODINGS.get(kind.name)
    return Format(
        kind.name,
        block_elements,
        block_bytes,
        lambda data: gguf.quants.dequantize(data, kind),
        None if coding is None else coding.decode,
    )

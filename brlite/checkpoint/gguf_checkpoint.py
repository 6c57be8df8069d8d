"""Reads a GGUF file as a checkpoint: its tensors as they are stored, with Hugging Face's names and order of rows.

The `gguf` package dequantizes tensors to float32; `gguf_codes.py` unpacks the formats whose codes are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from brlite.checkpoint.checkpoint import naming, weights_identity
from brlite.checkpoint.gguf_codes import BLOCKS, CODINGS
from brlite.checkpoint.gguf_config import ROPE_FREQS, GgufMetadata, hugging_face_config, hugging_face_name
from brlite.checkpoint.gguf_header import GgufHeader, read_gguf_header
from brlite.checkpoint.stored_tensor import PLAIN_FORMATS, Format, LocatedTensors, TensorLocation
from brlite.errors import ModelError
from brlite.files.quoting import excerpt

MAX_DIVISORS = 4096  # of rotary frequencies: they are read before the size of a head is known


class GgufCheckpoint(LocatedTensors):
    """Implements `Checkpoint`. A tensor is read only when its numbers or its codes are needed."""

    def __init__(self, files: Sequence[Path]) -> None:
        """`files` are a whole file, or all parts of a split one. The first part has the metadata."""
        self.path = files[0]
        headers = {file: read_gguf_header(file) for file in files}
        metadata, tensors = read_headers(headers)
        divisors = None
        if ROPE_FREQS in tensors:
            file, freqs = tensors.pop(ROPE_FREQS)
            if math.prod(freqs.shape) > MAX_DIVISORS:
                allowed = f"must have one number for each pair of a head's dimensions, at most {MAX_DIVISORS}"
                raise ModelError(f"{file}: {ROPE_FREQS} {allowed}; its shape is {freqs.shape}")
            (divisors,) = (
                tensor.float32().reshape(-1).tolist() for tensor in LocatedTensors({file: [freqs]}).tensors()
            )
        shapes = {name: tensor.shape for name, (_, tensor) in tensors.items()}
        with naming(self.path):
            self.config: dict[str, Any] = hugging_face_config(metadata, shapes, divisors)
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        interleaved = {"q_proj": heads, "k_proj": kv_heads} if metadata.architecture == "llama" else {}
        locations: dict[Path, list[TensorLocation]] = {file: [] for file in files}
        for name, (file, tensor) in tensors.items():
            num_heads = interleaved.get(name.split(".")[-2])
            head_rows = 0 if num_heads is None else self.config["head_dim"]
            if num_heads is not None and tensor.shape[0] != num_heads * head_rows:
                raise ModelError(f"{file}: {tensor.name} must have {num_heads * head_rows} rows: {tensor.shape}")
            locations[file].append(tensor._replace(name=name, head_rows=head_rows))
        super().__init__(locations)
        read = dict[Path, bytes]()
        for file, header in headers.items():
            with file.open("rb") as stream:
                read[file] = stream.read(header.data_start)
        self.identity = weights_identity(self.config, read)


def read_headers(
    headers: Mapping[Path, GgufHeader],
) -> tuple[GgufMetadata, dict[str, tuple[Path, TensorLocation]]]:
    """The metadata of a file or of all parts of a split one, in their order, and the tensors with the file of each.

    Tensors are named as Hugging Face does, but for `ROPE_FREQS`. Raises `ModelError` naming the file.
    """
    first, tensors = next(iter(headers)), dict[str, tuple[Path, TensorLocation]]()
    with naming(first):
        metadata = GgufMetadata(headers[first].metadata)
    for number, (file, header) in enumerate(headers.items()):
        with naming(file):
            for tensor in checked_tensors(header, number, len(headers)):
                name = ROPE_FREQS if tensor.name == ROPE_FREQS else hugging_face_name(tensor.name)
                if name in tensors:
                    raise ModelError(f"tensor {excerpt(tensor.name)} is listed twice")
                tensors[name] = file, tensor
    return metadata, tensors


def checked_tensors(header: GgufHeader, number: int, num_parts: int) -> list[TensorLocation]:
    """The table of tensors in the order of the data. Raises `ModelError` for one that cannot be read.

    The header is that of a split file's part `number`, counted from 0, of `num_parts`.
    """
    told_number, told_parts = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1) or 1
    if (told_number, told_parts) != (number, num_parts):
        raise ModelError(
            f"a split GGUF: split.no must be {number} and split.count {num_parts} by the file's name, got "
            f"{excerpt(told_number)} and {excerpt(told_parts)}; parts are named NAME-00001-of-00003.gguf"
        )
    formats = {
        type_id: _format(type_id, next(tensor.name for tensor in header.tensors if tensor.type_id == type_id))
        for type_id in sorted({tensor.type_id for tensor in header.tensors})
    }
    tensors, end = list[TensorLocation](), header.data_start
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        stored_as, begin = formats[tensor.type_id], header.data_start + tensor.offset
        if begin < end:
            raise ModelError(f"tensor {excerpt(tensor.name)} begins within the one before it")
        if 0 in tensor.shape or tensor.shape[-1] % stored_as.block_elements:
            wanted = f"{stored_as.name} needs {stored_as.block_elements}s"
            raise ModelError(f"tensor {excerpt(tensor.name)} has shape {tensor.shape}; {wanted}")
        tensors.append(TensorLocation(tensor.name, stored_as, tensor.shape, begin))
        end = begin + tensors[-1].num_bytes
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
        BLOCKS[kind.name].are_finite if kind.name in BLOCKS else None,
    )

"""Writes models as Q8_0 GGUF files for llama.cpp: the very weights that brlite loads, rounded to bfloat16 first.

All matrices become Q8_0, a tied head included; norms stay float32. One tensor is in memory at a time.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
from measuring.venvs import cache_folder

from brlite.checkpoint.stored_tensor import from_bfloat16, to_bfloat16

Q8_0 = gguf.GGMLQuantizationType.Q8_0
F32 = gguf.GGMLQuantizationType.F32
Kind = gguf.GGMLQuantizationType
# Where a block's numbers in half precision are, and what they become.
RANDOM_BLOCKS: Mapping[Kind, Mapping[int, float]] = {
    Kind.Q4_K: {0: 1e-4, 2: 7e-4},
    Kind.Q6_K: {208: 2e-5},
    Kind.IQ4_NL: {0: 3e-4},
    Kind.IQ4_XS: {0: 2e-5},
    Kind.MXFP4: {},
}
MXFP4_EXPONENTS = 119, 122  # of scales from 2^-8 to 2^-6
# What the writer states itself, and what would be untrue of the new file.
SKIPPED_KEYS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
ROWS_AT_A_TIME = 1024

Shapes = Mapping[str, tuple[int, ...]]


def find_q8_file(path: Path) -> Path:
    """The Q8_0 form of a GGUF file, from the bench's cache or written there."""
    target = cache_folder() / "models" / f"{path.stem}-{path.stat().st_size}.Q8_0.gguf"
    if not target.exists():
        print(f"writing {path.name} as {target} …", file=sys.stderr)
        _convert(path, target)
    return target


def write_gguf(
    target: Path,
    architecture: str,
    add_metadata: Callable[[gguf.GGUFWriter], None],
    shapes: Shapes,
    tensors: Iterator[tuple[str, np.ndarray]],
    kinds: Mapping[str, Kind] = MappingProxyType({}),
) -> None:
    """Write `tensors` (float32, by llama.cpp's names) to `target`, whole or not at all; they come as `shapes` says.

    Matrices become Q8_0, or what `kinds` says; blocks of `RANDOM_BLOCKS` are random: gguf cannot make most of them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(unfinished, architecture)
    add_metadata(writer)
    if not kinds:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, shape in shapes.items():
        kind = kinds.get(name, Q8_0) if len(shape) == 2 else F32
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _num_bytes(shape, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for expected, (name, tensor) in zip(shapes, tensors, strict=True):
        assert name == expected, f"{name} came where {expected} was announced"
        writer.write_tensor_data(_encode(tensor, kinds.get(name, Q8_0)))
    writer.close()
    shutil.move(unfinished, target)


def _convert(source: Path, target: Path) -> None:
    reader = gguf.GGUFReader(source)
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    tensors = ((each.name, gguf.quants.dequantize(each.data, each.tensor_type)) for each in reader.tensors)
    architecture = str(reader.get_field("general.architecture").contents())
    write_gguf(target, architecture, lambda writer: _copy_metadata(reader, writer), shapes, tensors)


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if not name.startswith(SKIPPED_KEYS):
            kind, *element = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=element[0] if element else None)


def _encode(tensor: np.ndarray, kind: Kind) -> np.ndarray:
    if tensor.ndim != 2:
        return np.ascontiguousarray(tensor, dtype=np.float32)
    if kind in RANDOM_BLOCKS:
        return _random_blocks(tensor.shape, kind)
    blocks = [tensor[row : row + ROWS_AT_A_TIME] for row in range(0, len(tensor), ROWS_AT_A_TIME)]
    return np.concatenate([gguf.quants.quantize(round_to_bfloat16(block), kind) for block in blocks])


def _random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Codes of all values, with scales that give weights of about 0.02."""
    elements, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(shape[0])
    blocks = np.frombuffer(random.bytes(int(np.prod(shape)) // elements * num_bytes), np.uint8).copy()
    blocks = blocks.reshape(shape[0], -1, num_bytes)
    if kind == Kind.MXFP4:
        blocks[..., 0] = random.integers(*MXFP4_EXPONENTS, blocks.shape[:2])
    for begin, scale in RANDOM_BLOCKS[kind].items():
        blocks[..., begin : begin + 2] = np.array([scale], "<f2").view(np.uint8)
    return blocks.reshape(shape[0], -1)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of each, ties to even, as float32."""
    return from_bfloat16(to_bfloat16(values))


def _num_bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // int(block_elements) * int(block_bytes)

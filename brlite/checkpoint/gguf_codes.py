"""Unpacks GGML's quantized blocks into codes, scales and minimums, for the formats whose codes are kept in memory.

A weight is scale · code + minimum. `CODINGS` lists these formats: in each of them, 32 weights share a scale, as in the
kernels. `BLOCKS` lists those whose blocks native code packs as they are; Q4_K is in both, as torch has its codes.
All others are dequantized and then rounded to int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from brlite.checkpoint.stored_tensor import Bytes, Coded
from brlite.models.config import QUANTIZATION_GROUP
from brlite.models.precision import MatrixForm

IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)  # llama.cpp's kvalues_iq4nl


class Coding(NamedTuple):
    """The form of a format's matrices, the bytes of a block, and what unpacks blocks [R, N, block_bytes]."""

    form: MatrixForm
    block_bytes: int
    unpack: Callable[[Bytes], Coded]

    def decode(self, data: Bytes) -> Coded:
        """The codes, scales and minimums of rows [R, B] of the file."""
        return self.unpack(data.reshape(len(data), -1, self.block_bytes))


def _nibbles(data: Bytes) -> Bytes:
    """The 4-bit codes [..., 32] of 16 bytes: the low halves of all bytes, then the high halves."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _coded(codes: Bytes, scales: Bytes, minimums: Bytes | None = None) -> Coded:
    """Join the blocks [R, N, ...] of each row. Scales and minimums are the bytes of half-precision numbers."""
    rows = np.ascontiguousarray(codes).reshape(len(codes), -1)
    halves = [
        np.ascontiguousarray(data).view("<u2").reshape(len(data), -1) for data in (scales, minimums) if data is not None
    ]
    return Coded(rows, *halves)


def _q4_k(blocks: Bytes) -> Coded:
    """A super-block has 8 groups. Their scales and minimums are 6-bit integers times a half-precision number.

    These products have up to 17 bits. They are rounded to half precision, which has 11.
    """
    super_scale, super_minimum = (blocks[..., i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    low, middle, high = (blocks[..., i : i + 4] for i in (4, 8, 12))
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=-1)  # [R, N, 8]
    minimums = np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=-1)
    quarters = blocks[..., 16:].reshape(*blocks.shape[:2], 4, QUANTIZATION_GROUP)
    codes = np.stack([quarters & 15, quarters >> 4], axis=3)
    scale_bits, minimum_bits = (
        (factor * integers).astype("<f2").view(np.uint8)
        for factor, integers in ((super_scale, scales), (-super_minimum, minimums))
    )
    return _coded(codes, scale_bits, minimum_bits)


def _q5_0(blocks: Bytes) -> Coded:
    """A code has 5 bits. The fifth bits of a block's 32 codes are in 4 bytes of their own."""
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    return _coded((_nibbles(blocks[..., 6:]) | fifth << 4) - np.uint8(16), blocks[..., :2])


class BlockFormat(NamedTuple):
    """The form of a format's matrices in native code, and where in a block its half-precision numbers begin."""

    form: MatrixForm
    halves: tuple[int, ...]


BLOCKS: dict[str, BlockFormat] = {"Q4_K": BlockFormat("q4_k", (0, 2)), "Q6_K": BlockFormat("q6_k", (208,))}

# A block's layout is defined in llama.cpp, ggml-common.h.
CODINGS: dict[str, Coding] = {
    "Q4_0": Coding("int4", 18, lambda blocks: _coded(_nibbles(blocks[..., 2:]), blocks[..., :2])),
    "Q4_1": Coding("int4_min", 20, lambda blocks: _coded(_nibbles(blocks[..., 4:]), blocks[..., :2], blocks[..., 2:4])),
    "Q4_K": Coding("int4_min", 144, _q4_k),
    "Q5_0": Coding("int8_f16", 22, _q5_0),
    "Q8_0": Coding("int8_f16", 34, lambda blocks: _coded(blocks[..., 2:], blocks[..., :2])),
    "IQ4_NL": Coding(
        "int8_f16",
        18,
        lambda blocks: _coded(IQ4_NL_VALUES[_nibbles(blocks[..., 2:])].view(np.uint8), blocks[..., :2]),
    ),
}

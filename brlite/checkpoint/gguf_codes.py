"""Unpacks GGML's quantized blocks into codes, scales and minimums, for the formats whose codes are kept in memory.

A weight is scale · code + minimum. `CODINGS` lists these formats: in each of them, 32 weights share a scale, as in the
kernels. `BLOCKS` lists those whose blocks native code packs as they are. Some are in both, as torch has their codes.
All others are dequantized and then rounded to int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from brlite.checkpoint.stored_tensor import Bytes, Coded, are_finite
from brlite.models.config import QUANTIZATION_GROUP
from brlite.models.precision import MatrixForm

IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)  # llama.cpp's kvalues_iq4nl
E2M1_DOUBLES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


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


def _iq4_xs(blocks: Bytes) -> Coded:
    """As `_q4_k`: 6-bit integers less 32, times a half-precision number; each product is rounded to half precision."""
    super_scale = blocks[..., :2].copy().view("<f2").astype(np.float32)
    pairs = np.arange(8) // 2, np.arange(8) % 2 * 4
    lower = blocks[..., 4 + pairs[0]] >> pairs[1].astype(np.uint8) & 15  # [R, N, 8]
    upper = blocks[..., 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (super_scale * (lower.astype(np.int16) + 16 * upper.astype(np.int16) - 32)).astype("<f2")
    codes = IQ4_NL_VALUES[_nibbles(blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16))]
    return _coded(codes.view(np.uint8), scales.view(np.uint8))


def _mxfp4(blocks: Bytes) -> Coded:
    """E2M1 numbers as twice themselves, with half of the scale 2^(e - 127). Scales below 2^-24 become 0."""
    scales = np.ldexp(np.float32(1), blocks[..., :1].astype(np.int32) - 128).astype("<f2")
    return _coded(E2M1_DOUBLES[_nibbles(blocks[..., 1:])].view(np.uint8), scales.view(np.uint8))


class BlockFormat(NamedTuple):
    """The form of a format's matrices in native code, and what tells whether the scales of blocks are finite."""

    form: MatrixForm
    are_finite: Callable[[Bytes], bool]


def _halves_at(*places: int) -> Callable[[Bytes], bool]:
    return lambda blocks: all(are_finite(blocks[..., at : at + 2].copy().view("<u2")) for at in places)


BLOCKS: dict[str, BlockFormat] = {
    "Q4_K": BlockFormat("q4_k", _halves_at(0, 2)),
    "Q6_K": BlockFormat("q6_k", _halves_at(208)),
    "IQ4_NL": BlockFormat("iq4_nl", _halves_at(0)),
    "IQ4_XS": BlockFormat("iq4_xs", _halves_at(0)),
    "MXFP4": BlockFormat("mxfp4", lambda blocks: not (blocks[..., 0] == 255).any()),  # 255 is NaN in E8M0
}

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
    "IQ4_XS": Coding("int8_f16", 136, _iq4_xs),
    "MXFP4": Coding("int8_f16", 17, _mxfp4),
}

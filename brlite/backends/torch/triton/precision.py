"""Turns what memory holds into the type that matrix units multiply in: cached int8 levels, and words of weights.

The type is bfloat16; under Triton's interpreter, which has no bfloat16 product, float32. With `TRITON_INTERPRET=1` the
kernels run as numpy on the CPU, to test them without a card.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
DOT = tl.constexpr(tl.float32 if knobs.runtime.interpret else tl.bfloat16)

# 2^23 and its bits: with b four bits, the bits | b are those of 2^23 + b. Conversion instructions run at a quarter of
# the rate of this.
_TWO_23 = tl.constexpr(8388608.0)
_TWO_23_BITS = tl.constexpr(0x4B000000)

# Four levels in a register become two pairs of bfloat16. With b the bits of a level, 128 + (b & 127) and minus 128 or
# 256 (by its sign) are bfloat16 numbers whose last bytes are b & 127 and b & 128; their sum is the level. Conversion
# instructions run at an eighth of this rate.
_WIDEN = tl.constexpr(
    """{
    .reg .b32 low, sign, a, b, c, d, one;
    and.b32 low, $2, 0x7f7f7f7f;
    and.b32 sign, $2, 0x80808080;
    prmt.b32 a, low, 0x43434343, 0x4140;
    prmt.b32 b, sign, 0xc3c3c3c3, 0x4140;
    prmt.b32 c, low, 0x43434343, 0x4342;
    prmt.b32 d, sign, 0xc3c3c3c3, 0x4342;
    mov.b32 one, 0x3f803f80;
    fma.rn.bf16x2 $0, a, one, b;
    fma.rn.bf16x2 $1, c, one, d;
    }"""
)


@triton.jit
def widen(levels):
    """int8 levels in the type of the product, exactly."""
    if IS_INTERPRETED:
        return levels.to(DOT)
    return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r", [levels], dtype=tl.bfloat16, is_pure=True, pack=4)


# A word holds four weights as sign and magnitude, which become level times factor, rounded once. With m a magnitude,
# 0x4300 | m are the bits of the bfloat16 number 128 + m, and (128 + m) · factor - 128 · factor is m · factor. This
# takes two instructions per weight and moves no bytes.
_SCALE_WORD = tl.constexpr(
    """{
    .reg .b32 factor, minus, low, high, sign, minus_zero;
    mov.b32 factor, {$5, $5};
    mov.b32 minus, 0xc300c300;
    mov.b32 minus_zero, 0x80008000;
    fma.rn.bf16x2 minus, factor, minus, minus_zero;
    and.b32 low, $4, 0x007f007f;
    or.b32 low, low, 0x43004300;
    shr.u32 high, $4, 8;
    and.b32 high, high, 0x007f007f;
    or.b32 high, high, 0x43004300;
    fma.rn.bf16x2 low, low, factor, minus;
    fma.rn.bf16x2 high, high, factor, minus;
    shl.b32 sign, $4, 8;
    and.b32 sign, sign, 0x80008000;
    xor.b32 low, low, sign;
    and.b32 sign, $4, 0x80008000;
    xor.b32 high, high, sign;
    mov.b32 {$0, $1}, low;
    mov.b32 {$2, $3}, high;
    }"""
)


@triton.jit
def _scaled_byte(words, factors, SHIFT: tl.constexpr):
    byte = words >> SHIFT & 255
    level = tl.where(byte < 128, byte, 128 - byte)
    return (level.to(tl.float32) * factors).to(tl.bfloat16).to(DOT)


@triton.jit
def _decoded(words, factors, SHIFT: tl.constexpr, FORM: tl.constexpr):
    """The weights of the codes at SHIFT, exactly as the file means them, rounded to bfloat16."""
    scales = factors.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if FORM == "int8_f16":
        weights = (words << 24 - SHIFT >> 24).to(tl.float32) * scales
    else:
        shifted = ((words >> SHIFT & 15) | _TWO_23_BITS).to(tl.float32, bitcast=True)
        offsets = (factors >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        if FORM == "int4_min":
            weights = tl.fma(shifted - _TWO_23, scales, offsets)
        else:
            weights = (shifted - (_TWO_23 + offsets)) * scales
    return weights.to(tl.bfloat16).to(DOT)


@triton.jit
def _four_weights(words, factors, SHIFT: tl.constexpr, FORM: tl.constexpr):
    """Of each word the codes at SHIFT of its four bytes, as inputs (i, i + 1) and (i + 8, i + 9): [N, words, 2, 2]."""
    low = tl.join(_decoded(words, factors, SHIFT, FORM), _decoded(words, factors, SHIFT + 16, FORM))
    high = tl.join(_decoded(words, factors, SHIFT + 8, FORM), _decoded(words, factors, SHIFT + 24, FORM))
    return tl.join(low, high)


@triton.jit
def _scaled(words, factors):
    """As `_four_weights`, in the form "int8": level times factor, a bfloat16 number in float32."""
    if IS_INTERPRETED:
        first = _scaled_byte(words, factors, 0)
        second = _scaled_byte(words, factors, 16)
        ninth = _scaled_byte(words, factors, 8)
        tenth = _scaled_byte(words, factors, 24)
    else:
        first, second, ninth, tenth = tl.inline_asm_elementwise(
            _SCALE_WORD,
            "=h,=h,=h,=h,r,h",
            [words, factors.to(tl.bfloat16)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    return tl.join(tl.join(first, second), tl.join(ninth, tenth))


@triton.jit
def dequantized(words, factors, FORM: tl.constexpr, SIZE: tl.constexpr):
    """The weights [N, SIZE] of `words` [N, SIZE / 4 or 8] of `pack_words` with the scales of `Matrix`, rounded to
    bfloat16, in the type of the product."""
    weights = _scaled(words, factors) if FORM == "int8" else _four_weights(words, factors, 0, FORM)
    if FORM == "int8" or FORM == "int8_f16":
        weights = tl.permute(tl.reshape(weights, [words.shape[0], SIZE // 16, 4, 2, 2]), (0, 1, 4, 2, 3))
    else:
        weights = tl.join(weights, _four_weights(words, factors, 4, FORM))
        weights = tl.permute(tl.reshape(weights, [words.shape[0], SIZE // 32, 4, 2, 2, 2]), (0, 1, 5, 4, 2, 3))
    return tl.reshape(weights, [words.shape[0], SIZE])

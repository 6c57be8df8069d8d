"""The type that matrix units multiply in: bfloat16; under Triton's interpreter, which has no such product, float32.

With `TRITON_INTERPRET=1` the kernels run as numpy on the CPU; so they are tested where there is no card.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
DOT = tl.constexpr(tl.float32 if knobs.runtime.interpret else tl.bfloat16)

# Four levels in a register become two pairs of bfloat16. With b the bits of a level, 128 + (b & 127) and minus 128 or
# 256 (by its sign) are bfloat16 numbers whose last bytes are b & 127 and b & 128; their sum is the level. Instructions
# that convert are an eighth as fast.
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
    """int8 as it is multiplied, exactly."""
    if IS_INTERPRETED:
        return levels.to(DOT)
    return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r", [levels], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def scaled(levels, factors):
    """int8 levels times factors (bfloat16 numbers in float32), rounded to bfloat16, as it is multiplied."""
    if IS_INTERPRETED:
        return (levels.to(tl.float32) * factors).to(tl.bfloat16).to(DOT)
    return widen(levels) * factors.to(tl.bfloat16)

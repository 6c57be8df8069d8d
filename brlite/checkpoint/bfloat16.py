"""bfloat16 on the host: numpy has no such type, so its numbers are held as their 16 bits, the upper half of a float32.

Used wherever weights are read, packed or written without torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def to_bfloat16(values: npt.NDArray[np.float32], *, keeps_subnormal: bool = True) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, halves to even; NaN stays NaN.

    Without `keeps_subnormal` a float32 below 2^-126 becomes 0 of its sign, as the kernels' own rounding does it.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    halves = bits >> 16
    magnitude = bits & 0x7FFFFFFF
    if int(np.bitwise_or.reduce(bits, axis=None, initial=0)) & 0xFFFF:  # most checkpoints hold bfloat16 numbers already
        rounded = (bits + np.uint32(0x7FFF) + (halves & 1)) >> 16
        halves = np.where(magnitude > 0x7F800000, halves | 0x40, rounded)
    if not keeps_subnormal:
        halves = np.where(magnitude < 0x00800000, (bits >> 16) & 0x8000, halves)
    return halves.astype(np.uint16)


def from_bfloat16(halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers of these bits: bfloat16 is the upper half of a float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)

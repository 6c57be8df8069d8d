"""The precisions that a config may name, the numbers that each stands for, and rounding to bfloat16 on the host.

Leaves int8 to those that hold it: native code packs it, `backends/torch/quantize.py` quantizes for torch. numpy is
imported where it rounds, since the command line reads the names of precisions without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PrecisionName = Literal["bf16", "a_bf16_w_int8", "a_bf16_w_int8_kv_int8"]
PrecisionOption = Literal["auto", "bf16", "a_bf16_w_int8", "a_bf16_w_int8_kv_int8"]  # auto: what the files hold

# How a matrix is held. Those behind int8 have the digits of quantised files: codes of 8 or 4 bits, with scales (and
# minimums, or zero points) in half precision; int8 is rounded here, with scales in bfloat16.
MatrixForm = Literal["bfloat16", "int8", "int8_f16", "int4", "int4_min", "int4_zero"]
INT4_FORMS: frozenset[MatrixForm] = frozenset({"int4", "int4_min", "int4_zero"})


class Precision(NamedTuple):
    """What a model's matrices are rounded to, and what its KV cache holds. Norms are float32 in each of them.

    `stored` matrices keep the digits of a quantised file where the kernels have a form for them, else become int8.
    """

    weights: Literal["bfloat16", "int8", "stored"]
    kv: Literal["bfloat16", "int8"]

    @property
    def has_int8_weights(self) -> bool:
        return self.weights == "int8"

    @property
    def weights_name(self) -> str:
        """The name that packed weights have in files: precisions that differ in their KV cache share it."""
        if self.weights == "stored":
            return "stored"
        return next(name for name, precision in PRECISIONS.items() if precision.weights == self.weights)


PRECISIONS: dict[PrecisionName, Precision] = {
    "bf16": Precision("bfloat16", "bfloat16"),
    "a_bf16_w_int8": Precision("int8", "bfloat16"),
    "a_bf16_w_int8_kv_int8": Precision("int8", "int8"),
}
STORED = Precision("stored", "bfloat16")


def to_bfloat16(values: npt.NDArray[np.float32], *, keeps_subnormal: bool = True) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, halves to even; NaN stays NaN.

    Without `keeps_subnormal` a float32 below 2^-126 becomes 0 of its sign, as the kernels' own rounding does it.
    """
    import numpy as np

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
    import numpy as np

    return (halves.astype(np.uint32) << 16).view(np.float32)

"""The precisions that a model may be served in, and the forms that each gives to a model's matrices and its KV cache.

Rounding is elsewhere: bfloat16 in `checkpoint/stored_tensor.py`; int8 in native code, and for torch in
`backends/torch/quantize.py`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

# The manual's three, which every backend has and a bundle may be made for.
PrecisionName = Literal["bf16", "a_bf16_w_int8", "a_bf16_w_int8_kv_int8"]
# auto: what the files hold.
PrecisionOption = Literal["auto", "bf16", "a_bf16_w_int8", "a_bf16_w_int8_kv_int8", "a_int8_w_int8"]

# How a matrix is held. Those behind int8 have the digits of quantized files: codes of 8 or 4 bits, with scales (and
# minimums, or zero points) in half precision; int8 is rounded here, with scales in bfloat16.
MatrixForm = Literal["bfloat16", "int8", "int8_f16", "int4", "int4_min", "int4_zero"]
INT4_FORMS: frozenset[MatrixForm] = frozenset({"int4", "int4_min", "int4_zero"})


class Precision(NamedTuple):
    """What a model's matrices are rounded to, and what its KV cache holds. Norms are float32 in each of them.

    `stored` matrices keep the digits of a quantized file where the kernels have a form for them, else become int8.
    With `has_int8_activations` the inputs of matrices are int8, with one scale for 32 inputs. Only native code has it.
    """

    weights: Literal["bfloat16", "int8", "stored"]
    kv: Literal["bfloat16", "int8"]
    has_int8_activations: bool = False

    @property
    def has_int8_weights(self) -> bool:
        return self.weights == "int8"

    @property
    def weights_name(self) -> str:
        """The name that packed weights have in files: precisions with the same weights share it."""
        if self.weights == "stored":
            return "stored"
        return next(name for name, precision in PRECISIONS.items() if precision.weights == self.weights)


PRECISIONS: dict[PrecisionOption, Precision] = {
    "bf16": Precision("bfloat16", "bfloat16"),
    "a_bf16_w_int8": Precision("int8", "bfloat16"),
    "a_bf16_w_int8_kv_int8": Precision("int8", "int8"),
    "a_int8_w_int8": Precision("int8", "bfloat16", has_int8_activations=True),
}

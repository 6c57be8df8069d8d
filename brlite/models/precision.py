"""The precisions that a model may be served in, with the forms of its matrices and its KV cache.

Rounding is elsewhere: bfloat16 in `checkpoint/stored_tensor.py`; int8 and int4 in native code, int8 for torch in
`backends/torch/quantize.py`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

# The manual's three precisions. Every backend has them, and a bundle may be made for each.
PrecisionName = Literal["bf16", "a_bf16_w_int8", "a_bf16_w_int8_kv_int8"]
# auto: the precision of the files.
PrecisionOption = Literal["auto", "bf16", "a_bf16_w_int8", "a_bf16_w_int8_kv_int8", "a_int8_w_int8", "a_bf16_w_int4"]
NATIVE_ONLY: frozenset[PrecisionOption] = frozenset({"a_int8_w_int8", "a_bf16_w_int4"})

# The form of a matrix in memory. int8 is rounded by us, with scales in bfloat16. The forms after it keep the codes of
# quantized files: 8 or 4 bits, with scales (and minimums, or zero points) in half precision. The last five keep GGML's
# formats of these names whole; the codes of the last three stand for the numbers of a table. Only native code has them;
# torch has int4_min, int8_f16 and int8 in their place.
MatrixForm = Literal[
    "bfloat16", "int8", "int8_f16", "int4", "int4_min", "int4_zero", "q4_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4"
]
INT4_FORMS: frozenset[MatrixForm] = frozenset({"int4", "int4_min", "int4_zero", "q4_k", "iq4_nl", "iq4_xs", "mxfp4"})


class Precision(NamedTuple):
    """The forms of a model's matrices and of its KV cache. Norms are always float32.

    `stored` matrices keep the codes of a quantized file if the kernels have a form for them, else become int8.
    `int4` matrices are rounded to 4 bits, but heads to int8; those that a quantized file has in 4 bits are kept.
    With `has_int8_activations` the inputs of matrices are int8, with one scale for 32 inputs.
    """

    weights: Literal["bfloat16", "int8", "int4", "stored"]
    kv: Literal["bfloat16", "int8"]
    has_int8_activations: bool = False


PRECISIONS: dict[PrecisionOption, Precision] = {
    "bf16": Precision("bfloat16", "bfloat16"),
    "a_bf16_w_int8": Precision("int8", "bfloat16"),
    "a_bf16_w_int8_kv_int8": Precision("int8", "int8"),
    "a_int8_w_int8": Precision("int8", "bfloat16", has_int8_activations=True),
    "a_bf16_w_int4": Precision("int4", "bfloat16"),
}


def name_of(precision: Precision) -> PrecisionOption:
    """The name of one of `PRECISIONS`."""
    return next(name for name, each in PRECISIONS.items() if each == precision)


# `Precision.weights` → its name in packed files, which all precisions with these weights share.
WEIGHTS_NAMES = {"bfloat16": "bf16", "int8": "a_bf16_w_int8", "int4": "a_bf16_w_int4", "stored": "stored"}

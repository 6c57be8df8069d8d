"""Where each parameter of a decoder lies in the packed weights, and in which form. Knows sizes, not values.

The packed weights are one block of memory, and byte for byte what a packed file holds (`packed_file.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from brlite.backends.native.abi import (
    BF16,
    INT4,
    INT4_MIN,
    INT4_ZERO,
    INT8,
    INT8_F16,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    Q4_K,
    Q6_K,
)
from brlite.backends.native.memory import aligned
from brlite.models.config import QUANTIZATION_GROUP
from brlite.models.network import MatrixPart, Parameter
from brlite.models.precision import MatrixForm

# panels: a matrix in the kernels' layout; table: bfloat16 rows for look-up; vector: float32, padded with zeros.
Form = Literal["panels", "table", "vector"]

FORMATS: dict[MatrixForm, int] = {
    "bfloat16": BF16,
    "int8": INT8,
    "int8_f16": INT8_F16,
    "int4": INT4,
    "int4_min": INT4_MIN,
    "int4_zero": INT4_ZERO,
    "q4_k": Q4_K,
    "q6_k": Q6_K,
    "iq4_nl": IQ4_NL,
    "iq4_xs": IQ4_XS,
    "mxfp4": MXFP4,
}
CODED_FORMATS = (INT8_F16, INT4, INT4_MIN, INT4_ZERO)  # formats whose codes come from a quantized file
BLOCK_FORMATS = (Q4_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4)  # formats that are made of the file's blocks

# In packed files the norms of a layer come first, in this order, then the rest in the order of the operations.
FIRST_IN_LAYER = {"attention_norm": 0, "mlp_norm": 1, "q_norm": 2, "k_norm": 3}


class PackedTensor(msgspec.Struct, frozen=True):
    """One parameter, `num_outputs` × `num_inputs` (1 × its length for a vector), at `offset` of the packed weights.

    A matrix in several formats has one PackedTensor per format; it has the rows from `first_row` on.
    A vector with `is_rounded` (a bias) is rounded to bfloat16; a norm stays float32.
    """

    form: Form
    format: int
    num_outputs: int
    num_inputs: int
    offset: int
    num_bytes: int
    is_rounded: bool = False
    first_row: int = 0


class Layout(msgspec.Struct, frozen=True):
    """All parameters of a decoder by name, as in `list_parameters`, each in one or more parts."""

    tensors: dict[str, tuple[PackedTensor, ...]]
    num_bytes: int


def packed_layout(
    library: ctypes.CDLL, parameters: Mapping[str, Parameter], parts: Mapping[str, tuple[MatrixPart, ...]]
) -> Layout:
    """The layout of the parameters of a decoder or of one rank. `parts` gives the formats of each matrix.

    With tied embeddings `embedding` is stored as panels, used for both look-up and head.
    """
    # A layer's norms come before the rest of that layer.
    first: dict[tuple[str, ...], int] = {}  # position of each layer's first parameter
    keys = {}
    for position, name in enumerate(parameters):
        layer = first.setdefault(tuple(name.split(".")[:2]), position)
        keys[name] = layer, FIRST_IN_LAYER.get(name.rpartition(".")[2], len(FIRST_IN_LAYER)), position
    found: list[tuple[str, PackedTensor]] = []
    vector_bytes = {size: 4 * padded(size) for size in {parameter.shape[-1] for parameter in parameters.values()}}
    for name in sorted(parameters, key=keys.__getitem__):
        shape, is_rounded = parameters[name].shape, parameters[name].precision == "bfloat16"
        num_outputs, num_inputs = shape if len(shape) == 2 else (1, shape[0])
        if len(shape) == 1:
            found.append((name, PackedTensor("vector", BF16, 1, num_inputs, 0, vector_bytes[num_inputs], is_rounded)))
        elif name not in parts:
            found.append((name, PackedTensor("table", BF16, num_outputs, num_inputs, 0, 2 * num_outputs * num_inputs)))
        first_row = 0
        for form, num_rows in parts.get(name, ()):
            num_bytes = library.brlite_packed_bytes(FORMATS[form], num_rows, num_inputs)
            part = PackedTensor("panels", FORMATS[form], num_rows, num_inputs, 0, num_bytes, first_row=first_row)
            found.append((name, part))
            first_row += num_rows
    ends = np.cumsum(aligned(np.array([tensor.num_bytes for _, tensor in found], np.int64))).tolist()
    tensors: dict[str, tuple[PackedTensor, ...]] = {}
    for (name, tensor), begin in zip(found, [0, *ends], strict=False):
        tensors[name] = (*tensors.get(name, ()), replace(tensor, offset=begin))
    return Layout(tensors, ends[-1])


def padded(size: int) -> int:
    """The length of a row of floats padded with zeros to whole groups of inputs."""
    return -(-size // QUANTIZATION_GROUP) * QUANTIZATION_GROUP

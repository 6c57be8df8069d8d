"""Where each parameter of a decoder lies in the packed weights, and in which form. Knows sizes, not values.

The packed weights are one block of memory, and byte for byte what a packed file holds (`packed_file.py`).
"""

from __future__ import annotations

import ctypes
from itertools import groupby
from typing import Literal

import msgspec

from brlite.backends.native.abi import BF16, INT8
from brlite.backends.native.memory import aligned
from brlite.models.config import QUANTIZATION_GROUP, ModelConfig
from brlite.models.network import list_parameters
from brlite.models.shards import Shard, rank_parameters
from brlite.precision import Precision

# panels: a matrix as the kernels multiply by it; table: bfloat16 rows to look up; vector: float32, padded with zeros.
Form = Literal["panels", "table", "vector"]

# Packed files hold a layer's norms first, in this order, then the rest in that of the operations.
FIRST_IN_LAYER = {"attention_norm": 0, "mlp_norm": 1, "q_norm": 2, "k_norm": 3}


class PackedTensor(msgspec.Struct, frozen=True):
    """One parameter, `num_outputs` × `num_inputs` (1 × its length for a vector), at `offset` of the packed weights."""

    form: Form
    format: int
    num_outputs: int
    num_inputs: int
    offset: int
    num_bytes: int


class Layout(msgspec.Struct, frozen=True):
    """All of a decoder's parameters by name, as in `list_parameters`."""

    tensors: dict[str, PackedTensor]
    num_bytes: int


def packed_layout(
    library: ctypes.CDLL, config: ModelConfig, *, precision: Precision, shard: Shard | None = None
) -> Layout:
    """The layout for a model, or for one rank's shard of it.

    With tied embeddings `embedding` is panels, which serve both look-up and head.
    """
    tensors: dict[str, PackedTensor] = {}
    end = 0
    number_format = INT8 if precision.has_int8_weights else BF16
    parameters = list_parameters(config) if shard is None else rank_parameters(config, shard)
    for _, layer in groupby(parameters, key=lambda name: name.split(".")[:2]):
        for name in sorted(layer, key=lambda name: FIRST_IN_LAYER.get(name.rpartition(".")[2], len(FIRST_IN_LAYER))):
            shape = parameters[name].shape
            num_outputs, num_inputs = shape if len(shape) == 2 else (1, shape[0])
            if len(shape) == 1:
                tensor = PackedTensor("vector", BF16, 1, num_inputs, end, 4 * padded(num_inputs))
            elif parameters[name].precision == "bfloat16":
                tensor = PackedTensor("table", BF16, num_outputs, num_inputs, end, 2 * num_outputs * num_inputs)
            else:
                num_bytes = library.brlite_packed_bytes(number_format, num_outputs, num_inputs)
                tensor = PackedTensor("panels", number_format, num_outputs, num_inputs, end, num_bytes)
            tensors[name] = tensor
            end = aligned(end + tensor.num_bytes)
    return Layout(tensors, end)


def padded(size: int) -> int:
    """Rows of floats are filled up with zeros to whole groups of inputs."""
    return -(-size // QUANTIZATION_GROUP) * QUANTIZATION_GROUP

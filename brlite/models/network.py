"""A decoder as data: its operations in order, each with the parameters that it reads. No tensors, no mathematics.

Torch runs the list (`backends/torch/decoder.py`). Native code (`backends/native/plan.py`) and the kernels for CUDA
cards (`backends/torch/triton/plan.py`) compile it and fuse some. Its parameters determine which weights are allocated,
divided among ranks and counted. A new kind of layer needs one more operation here, and its code in each of the three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import msgspec

from brlite.models.config import (
    BFLOAT16_BYTES,
    CARD_GROUP_BYTES,
    FLOAT32_BYTES,
    GROUP_BYTES,
    QUANTIZATION_GROUP,
    ModelConfig,
)
from brlite.models.precision import MatrixForm

# A rank's part of a parameter. Rows: those of its heads (q, k and v), its part of gate and of up, or of its tokens.
# Inputs: the columns for its heads or for its part of the MLP. Rank 0 has the whole bias of such a matrix.
Sharding = Literal["whole", "qkv", "gate_up", "vocabulary", "head_inputs", "mlp_inputs", "summed_bias"]


class Parameter(msgspec.Struct, frozen=True):
    """One tensor of the decoder. The precision "weights" is the model's; the other precisions are fixed.

    A matrix with `is_looked_up` is an embedding, read by rows. It is also the head if its precision is "weights".
    """

    name: str
    shape: tuple[int, ...]
    precision: Literal["float32", "bfloat16", "weights"]
    sharding: Sharding = "whole"
    is_looked_up: bool = False


class MatrixPart(NamedTuple):
    """Rows of a matrix that native code holds in one form."""

    form: MatrixForm
    num_rows: int


class Embed(msgspec.Struct, frozen=True):
    """The residual stream [T, H] begins as the rows of `weight` for token ids [T]."""

    weight: Parameter


class Norm(msgspec.Struct, frozen=True):
    """The residual stream, divided by its root mean square in each row, times `weight` [H]."""

    weight: Parameter
    epsilon: float


class Multiply(msgspec.Struct, frozen=True):
    """`weight` times the previous operation's result, plus `bias`. `output` names the result; if it is `hidden`, it is
    added to the residual stream."""

    name: str
    weight: Parameter
    bias: Parameter | None
    output: Literal["qkv", "gate_up", "hidden", "logits"]


class HeadNorm(msgspec.Struct, frozen=True):
    """RMS norm of each head of queries and of keys, with weights [D]."""

    query: Parameter
    key: Parameter
    epsilon: float


class Rotate(msgspec.Struct, frozen=True):
    """Rotates the first `rotary_dim` of each head of queries and keys by its position."""

    rotary_dim: int


class Attend(msgspec.Struct, frozen=True):
    """Keys and values go to the cache of `layer`; queries see the last `window` tokens there, or all: [T, Hq · D]."""

    layer: int
    window: int | None


class Gate(msgspec.Struct, frozen=True):
    """silu(gate) · up. A row has gate, then up, `size` numbers each."""

    size: int


Operation = Embed | Norm | Multiply | HeadNorm | Rotate | Attend | Gate


class Network(msgspec.Struct, frozen=True):
    """`body` computes every token's row of the residual stream, `norm` and `head` the logits of the rows that draw."""

    body: tuple[Operation, ...]
    norm: Norm
    head: Multiply

    @property
    def multiplications(self) -> list[Multiply]:
        return [*(operation for operation in self.body if isinstance(operation, Multiply)), self.head]


def build_network(config: ModelConfig) -> Network:
    """The network of `config`, or with a rank's `shard_config` that of the rank."""
    shape, is_tied = (config.vocab_size, config.hidden_size), config.tie_word_embeddings
    embedding = Parameter("embedding", shape, "weights" if is_tied else "bfloat16", "vocabulary", is_looked_up=True)
    head = embedding if is_tied else Parameter("head.weight", shape, "weights", "vocabulary")
    layers = (operation for layer in range(config.num_layers) for operation in _layer(config, layer))
    return Network((Embed(embedding), *layers), _norm(config, "norm"), Multiply("head", head, None, "logits"))


def _layer(config: ModelConfig, layer: int) -> Iterator[Operation]:
    prefix, hidden, mlp = f"layers.{layer}.", config.hidden_size, config.intermediate_size
    q, qkv = config.q_size, config.q_size + 2 * config.kv_size
    yield _norm(config, f"{prefix}attention_norm")
    yield _multiply(f"{prefix}qkv", (qkv, hidden), "qkv", "qkv", has_bias=config.qkv_bias)
    if config.qk_norm:
        query, key = (Parameter(f"{prefix}{name}_norm", (config.head_dim,), "float32") for name in "qk")
        yield HeadNorm(query, key, config.rms_norm_eps)
    if layer not in config.nope_layers:
        yield Rotate(config.rope.rotary_dim)
    yield Attend(layer, config.window(layer))
    yield _multiply(f"{prefix}o", (hidden, q), "head_inputs", "hidden", has_bias=config.o_bias)
    yield _norm(config, f"{prefix}mlp_norm")
    yield _multiply(f"{prefix}gate_up", (2 * mlp, hidden), "gate_up", "gate_up", has_bias=config.mlp_bias)
    yield Gate(mlp)
    yield _multiply(f"{prefix}down", (hidden, mlp), "mlp_inputs", "hidden", has_bias=config.mlp_bias)


def _norm(config: ModelConfig, name: str) -> Norm:
    return Norm(Parameter(name, (config.hidden_size,), "float32"), config.rms_norm_eps)


def _multiply(
    name: str,
    shape: tuple[int, int],
    sharding: Sharding,
    output: Literal["qkv", "gate_up", "hidden"],
    *,
    has_bias: bool,
) -> Multiply:
    bias_sharding: Sharding = "summed_bias" if output == "hidden" else sharding
    bias = Parameter(f"{name}.bias", shape[:1], "bfloat16", bias_sharding) if has_bias else None
    return Multiply(name, Parameter(f"{name}.weight", shape, "weights", sharding), bias, output)


def list_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of the decoder by name, in the order of the operations; a tied embedding once."""
    network = build_network(config)
    found: dict[str, Parameter] = {}
    for operation in (*network.body, network.norm, network.head):
        for value in (getattr(operation, field) for field in operation.__struct_fields__):
            if isinstance(value, Parameter):
                found[value.name] = value
    return found


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(parameter.shape) for parameter in list_parameters(config).values())


def weight_bytes(config: ModelConfig, bytes_per_weight: int, forms: Mapping[str, MatrixForm]) -> int:
    """Bytes of all parameters in torch: `bytes_per_weight` for each weight, except norms and matrices in `forms`."""
    total = 0
    for name, parameter in list_parameters(config).items():
        if name in forms:
            num_groups = math.ceil(parameter.shape[1] / QUANTIZATION_GROUP)
            total += parameter.shape[0] * num_groups * CARD_GROUP_BYTES[forms[name]]
        else:
            total += math.prod(parameter.shape) * (
                FLOAT32_BYTES if parameter.precision == "float32" else bytes_per_weight
            )
    return total


def native_weight_bytes(parameters: Mapping[str, Parameter], parts: Mapping[str, tuple[MatrixPart, ...]]) -> int:
    """Bytes of `parameters` in native code: vectors in float32, matrices in their `parts`.

    A matrix without parts is an embedding that is only looked up, in bfloat16. A tied embedding is held once, as head.
    """
    total = 0.0
    for name, parameter in parameters.items():
        if len(parameter.shape) == 1:
            total += parameter.shape[0] * FLOAT32_BYTES
            continue
        num_rows, num_inputs = parameter.shape
        num_groups = math.ceil(num_inputs / QUANTIZATION_GROUP)
        for part in parts.get(name, (MatrixPart("bfloat16", num_rows),)):
            is_plain = part.form == "bfloat16"
            total += part.num_rows * (num_inputs * BFLOAT16_BYTES if is_plain else num_groups * GROUP_BYTES[part.form])
    return int(total)

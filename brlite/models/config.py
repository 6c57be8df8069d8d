"""What a decoder of the Llama-shaped family is made of, in numbers. Knows no tensors and imports no torch.

`parameter_shapes` is the one list of a decoder's parameters: the loader allocates by it, and memory is counted by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from brlite.errors import ModelError
from brlite.precision import Precision

KVDtype = Literal["float32", "bfloat16", "int8"]

FLOAT32_BYTES = 4
BFLOAT16_BYTES = 2
KV_SCALE_BYTES = FLOAT32_BYTES
KV_BYTES: dict[KVDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
QUANTIZATION_GROUP = 32  # int8 weights share one bfloat16 scale for each so many inputs of an output row
GROUP_BYTES = QUANTIZATION_GROUP + BFLOAT16_BYTES  # 1.0625 a weight


class LinearScaling(msgspec.Struct, frozen=True):
    """Positions are divided by `factor`."""

    factor: float


class DynamicScaling(msgspec.Struct, frozen=True):
    """The base grows with the context beyond `original_positions` (NTK-aware)."""

    factor: float
    original_positions: int


class Llama3Scaling(msgspec.Struct, frozen=True):
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


class YarnScaling(msgspec.Struct, frozen=True):
    """Stretched like `Llama3Scaling` along a ramp over dimensions; cosines and sines are multiplied by
    `attention_factor`."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary positions. The first `rotary_dim` of each head turn: halves against each other, or neighbours where
    `interleaved`."""

    rotary_dim: int
    theta: float = 10_000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one decoder. The activation is SiLU, norms are RMS norms: the family has no others.

    With `qk_norm` each head of queries and keys is normalised before it turns. `sliding_layers` are the layers that
    look back `sliding_window` tokens only, the current one included; in `nope_layers` no head turns.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    nope_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads != 0:
            raise ModelError(
                f"model config: num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})"
            )
        if self.rope.rotary_dim % 2 != 0 or not 0 < self.rope.rotary_dim <= self.head_dim:
            raise ModelError(
                f"model config: the rotary dimension must be even and at most head_dim ({self.head_dim}), "
                f"got {self.rope.rotary_dim}"
            )

    @property
    def group_size(self) -> int:
        """How many query heads share one key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def max_context(self) -> int:
        """The longest context the model is made for: dynamic and yarn scaling stretch the positions it names."""
        scaling = self.rope.scaling
        if isinstance(scaling, DynamicScaling | YarnScaling):
            return max(self.max_position_embeddings, int(scaling.original_positions * scaling.factor))
        return self.max_position_embeddings

    @property
    def common_window(self) -> int | None:
        """The window beyond which no layer looks back, if there is one."""
        return self.sliding_window if len(self.sliding_layers) == self.num_layers else None

    def window(self, layer: int) -> int | None:
        """How many tokens `layer` looks back; None for all of them."""
        return self.sliding_window if layer in self.sliding_layers else None

    def rotary_dim(self, layer: int) -> int:
        """How many dimensions of each head turn in `layer`."""
        return 0 if layer in self.nope_layers else self.rope.rotary_dim


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the decoder by name. q, k and v are one matrix, and so are gate and up.

    With tied embeddings there is no `head.weight`: `embedding` serves as both.
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in _layer_shapes(config).items()})
    shapes["norm"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    linears = (
        ("qkv", config.q_size + 2 * config.kv_size, hidden, config.qkv_bias),
        ("o", hidden, config.q_size, config.o_bias),
        ("gate_up", 2 * intermediate, hidden, config.mlp_bias),
        ("down", hidden, intermediate, config.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"attention_norm": (hidden,), "mlp_norm": (hidden,)}
    if config.qk_norm:
        shapes.update(q_norm=(config.head_dim,), k_norm=(config.head_dim,))
    for name, num_outputs, num_inputs, has_bias in linears:
        shapes[f"{name}.weight"] = (num_outputs, num_inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (num_outputs,)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def parameter_dtype(name: str) -> Literal["float32", "bfloat16"]:
    """The digits of a parameter that every precision keeps: all of a norm's, those of bfloat16 of the others."""
    return "float32" if name.endswith("norm") else "bfloat16"


def is_quantized(name: str) -> bool:
    """Whether int8 precisions hold the parameter in int8. A head that is the embedding too has no name of its own."""
    return name.endswith(".weight")


def weight_bytes(config: ModelConfig, bytes_per_weight: int, *, keeps_int8: bool = False) -> int:
    """Bytes of all parameters as they are held: norms in float32, the rest at `bytes_per_weight`, or some in int8."""
    return sum(
        _int8_bytes(*shape)
        if keeps_int8 and is_quantized(name)
        else math.prod(shape) * (FLOAT32_BYTES if parameter_dtype(name) == "float32" else bytes_per_weight)
        for name, shape in parameter_shapes(config).items()
    )


def native_weight_bytes(
    config: ModelConfig, *, is_int8: bool, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> int:
    """Bytes of all parameters as native code holds them: norms and biases in float32, matrices in bfloat16 or int8.

    `shapes` are those of a part of them.

    An embedding that is only looked up stays bfloat16; a tied one is the head's matrix, held once.
    """
    return sum(
        _native_bytes(shape, is_int8=is_int8 and (name != "embedding" or config.tie_word_embeddings))
        for name, shape in (parameter_shapes(config) if shapes is None else shapes).items()
    )


def _native_bytes(shape: tuple[int, ...], *, is_int8: bool) -> int:
    if len(shape) == 1:
        return shape[0] * FLOAT32_BYTES
    num_outputs, num_inputs = shape
    return _int8_bytes(num_outputs, num_inputs) if is_int8 else num_outputs * num_inputs * BFLOAT16_BYTES


def _int8_bytes(num_outputs: int, num_inputs: int) -> int:
    return num_outputs * math.ceil(num_inputs / QUANTIZATION_GROUP) * GROUP_BYTES


def cache_dtype(precision: Precision, dtype: Literal["auto", "float32", "bfloat16"]) -> KVDtype:
    """What keys and values are kept in: int8 by the precision, float32 only where `engine.dtype` asks for it."""
    if precision.kv == "int8":
        return "int8"
    return "float32" if dtype == "float32" else "bfloat16"


def kv_bytes_per_token(config: ModelConfig, kv_dtype: KVDtype) -> int:
    """Bytes that one token's keys and values take in all layers; int8 adds a scale for each head."""
    per_head = config.head_dim * KV_BYTES[kv_dtype] + (KV_SCALE_BYTES if kv_dtype == "int8" else 0)
    return 2 * config.num_layers * config.num_kv_heads * per_head

"""The sizes and options of a decoder with Llama's architecture. Has no tensors and imports no torch.

`network.py` makes the list of operations from them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from brlite.errors import ModelError
from brlite.models.precision import MatrixForm, Precision

KVDtype = Literal["float32", "bfloat16", "int8"]

FLOAT32_BYTES = 4
BFLOAT16_BYTES = 2
KV_SCALE_BYTES = FLOAT32_BYTES
KV_BYTES: dict[KVDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
QUANTIZATION_GROUP = 32  # this many inputs of an output row share one scale of 2 bytes, in integer weights
# Bytes of a group with its scale, and its minimum or zero point. A block has 8 groups: of q4_k 148 bytes, of q6_k 210,
# of iq4_xs 138.
GROUP_BYTES: dict[MatrixForm, float] = {
    "int8": 34,
    "int8_f16": 34,
    "int4": 18,
    "int4_min": 20,
    "int4_zero": 20,
    "q4_k": 18.5,
    "q6_k": 26.25,
    "iq4_nl": 18,
    "iq4_xs": 17.25,
    "mxfp4": 17,
}
# In torch on a card: a scale in float32, or scale and offset in half precision.
CARD_GROUP_BYTES: dict[MatrixForm, int] = {"int8": 36, "int8_f16": 36, "int4": 20, "int4_min": 20, "int4_zero": 20}


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
    """Like `Llama3Scaling`, with a ramp over dimensions. Cosines and sines are multiplied by `attention_factor`."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary positions. The first `rotary_dim` of each head are rotated, in pairs of the two halves, or neighbours if
    `interleaved`."""

    rotary_dim: int
    theta: float = 10_000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The config of one decoder. The activation is always SiLU, norms are always RMS norms.

    With `qk_norm` each head of queries and keys is normalised before its rotation. `sliding_layers` attend to the last
    `sliding_window` tokens only, the current one included. `nope_layers` have no rotary positions.
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
        """The longest context that the model supports, which dynamic and YaRN scaling extend."""
        scaling = self.rope.scaling
        if isinstance(scaling, DynamicScaling | YarnScaling):
            return max(self.max_position_embeddings, int(scaling.original_positions * scaling.factor))
        return self.max_position_embeddings

    @property
    def common_window(self) -> int | None:
        """The sliding window in tokens if every layer has one; None if a layer sees the whole context."""
        return self.sliding_window if len(self.sliding_layers) == self.num_layers else None

    def window(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens; None if it sees the whole context."""
        return self.sliding_window if layer in self.sliding_layers else None


def cache_dtype(precision: Precision, dtype: Literal["auto", "float32", "bfloat16"]) -> KVDtype:
    """The type of keys and values: int8 if the precision has it, float32 only if `engine.dtype` is float32."""
    if precision.kv == "int8":
        return "int8"
    return "float32" if dtype == "float32" else "bfloat16"


def kv_bytes_per_token(config: ModelConfig, kv_dtype: KVDtype) -> int:
    """Bytes that one token's keys and values take in all layers; int8 adds a scale for each head."""
    per_head = config.head_dim * KV_BYTES[kv_dtype] + (KV_SCALE_BYTES if kv_dtype == "int8" else 0)
    return 2 * config.num_layers * config.num_kv_heads * per_head

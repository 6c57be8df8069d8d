"""ChatGLM3: its own config keys and weight names. Half of each head is rotated, in neighbouring pairs.

Its keys for the sizes: `num_layers`, `kv_channels`, `multi_query_group_num`, `ffn_hidden_size`, `seq_length`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.models.config import ModelConfig, RopeConfig
from brlite.models.families.family import Family, WeightNames
from brlite.models.families.hf_config import DEFAULT_THETA, MAX_LAYERS, ConfigReader, check_supported

# Options of its code that no published ChatGLM3 uses, with the only value that is supported.
FIXED_FLAGS = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
}
# The defaults of its code for keys that the config lacks.
CLASS_DEFAULTS = {
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "kv_channels": 128,
    "seq_length": 2048,
}
WEIGHT_NAMES: WeightNames = {
    "embedding": "transformer.embedding.word_embeddings",
    "attention_norm": "transformer.encoder.layers.{}.input_layernorm",
    "qkv": "transformer.encoder.layers.{}.self_attention.query_key_value",
    "o": "transformer.encoder.layers.{}.self_attention.dense",
    "mlp_norm": "transformer.encoder.layers.{}.post_attention_layernorm",
    "gate_up": "transformer.encoder.layers.{}.mlp.dense_h_to_4h",
    "down": "transformer.encoder.layers.{}.mlp.dense_4h_to_h",
    "norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer",
}
ABSENT = ("quantization_bit", "pre_seq_len")  # weights packed by a quantizer, a trained prefix


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(values, class_defaults=CLASS_DEFAULTS)
    check_supported(reader)
    for key, supported in FIXED_FLAGS.items():
        if reader.flag(key, supported) != supported:
            raise reader.error(key, str(supported).lower(), not supported)
    for key in ABSENT:
        if values.get(key):
            raise reader.error(key, "0 or null", values[key])
    head_dim, num_heads = reader.positive_int("kv_channels"), reader.positive_int("num_attention_heads")
    num_groups = reader.positive_int("multi_query_group_num")
    if num_heads % num_groups != 0:
        raise reader.error("multi_query_group_num", f"a divisor of num_attention_heads ({num_heads})", num_groups)
    theta = DEFAULT_THETA * reader.positive_number("rope_ratio", 1.0)  # the ratio stretches the base, not the positions
    return ModelConfig(
        vocab_size=reader.positive_int("padded_vocab_size"),
        hidden_size=reader.positive_int("hidden_size"),
        intermediate_size=reader.positive_int("ffn_hidden_size"),
        num_layers=reader.positive_int("num_layers", most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_groups,
        head_dim=head_dim,
        rms_norm_eps=reader.positive_number("layernorm_epsilon", 1e-5),
        max_position_embeddings=reader.positive_int("seq_length"),
        rope=RopeConfig(rotary_dim=head_dim // 2, theta=theta, interleaved=True),
        qkv_bias=reader.flag("add_qkv_bias", False),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
    )


CHATGLM = Family(
    "chatglm",
    "ChatGLMModel",
    read_config,
    WEIGHT_NAMES,
    ignored_suffixes=("rotary_pos_emb.inv_freq",),
    aliases=("ChatGLMForConditionalGeneration",),
)

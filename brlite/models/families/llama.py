"""Llama and CodeLlama. Its weight names are those of most Llama-shaped families, which import them from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.models.config import ModelConfig
from brlite.models.families.family import Family, WeightNames
from brlite.models.families.hf_config import ConfigReader, read_sizes

CLASS_DEFAULTS = {"max_position_embeddings": 2048}
WEIGHT_NAMES: WeightNames = {
    "embedding": "model.embed_tokens",
    "attention_norm": "model.layers.{}.input_layernorm",
    "qkv": tuple(f"model.layers.{{}}.self_attn.{each}_proj" for each in "qkv"),
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "o": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def read_config(values: Mapping[str, Any], class_defaults: Mapping[str, Any] = CLASS_DEFAULTS) -> ModelConfig:
    reader = ConfigReader(values, class_defaults=class_defaults)
    attention_bias = reader.flag("attention_bias", False)
    return ModelConfig(
        **read_sizes(reader),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=reader.flag("mlp_bias", False),
    )


LLAMA = Family("llama", "LlamaForCausalLM", read_config, WEIGHT_NAMES)

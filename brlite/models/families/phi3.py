"""Phi-3 and Phi-4: Llama with q, k and v in one matrix, gate and up in another, and a sliding window where named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.models.config import ModelConfig
from brlite.models.families import llama
from brlite.models.families.family import Family, WeightNames
from brlite.models.families.hf_config import ConfigReader, read_sizes, read_window

WEIGHT_NAMES: WeightNames = {
    **llama.WEIGHT_NAMES,
    "qkv": "model.layers.{}.self_attn.qkv_proj",
    "gate_up": "model.layers.{}.mlp.gate_up_proj",
}
CLASS_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(values, class_defaults=CLASS_DEFAULTS)
    return ModelConfig(**read_sizes(reader), **(read_window(reader) if "sliding_window" in reader else {}))


PHI3 = Family("phi3", "Phi3ForCausalLM", read_config, WEIGHT_NAMES)

"""Phi-3 and Phi-4: Llama with q, k and v in one matrix, gate and up in another, and a sliding window where named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.models.config import ModelConfig
from brlite.models.families.family import Family, WeightTarget
from brlite.models.families.hf_config import ConfigReader, check_supported, read_sizes, read_sliding_layers
from brlite.models.families.llama import weight_targets as llama_targets

SPLIT = tuple(
    f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up")
)  # what the two matrices take the place of
CLASS_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(values, class_defaults=CLASS_DEFAULTS)
    check_supported(reader)
    has_window = "sliding_window" in reader
    return ModelConfig(
        **read_sizes(reader),
        sliding_window=reader.positive_int("sliding_window") if has_window else None,
        sliding_layers=read_sliding_layers(reader) if has_window else (),
    )


def weight_targets(config: ModelConfig) -> dict[str, WeightTarget]:
    """Llama's names, but for the two matrices, which have the rows of what they join."""
    targets = {name: target for name, target in llama_targets(config).items() if not name.endswith(SPLIT)}
    for layer in range(config.num_layers):
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        qkv = (config.q_size + 2 * config.kv_size, config.hidden_size)
        targets[f"{source}self_attn.qkv_proj.weight"] = WeightTarget(f"{target}qkv.weight", qkv)
        gate_up = (2 * config.intermediate_size, config.hidden_size)
        targets[f"{source}mlp.gate_up_proj.weight"] = WeightTarget(f"{target}gate_up.weight", gate_up)
    return targets


PHI3 = Family("phi3", "Phi3ForCausalLM", read_config, weight_targets)

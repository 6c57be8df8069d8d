"""Qwen1.5 and Qwen2: Llama with biases on q, k and v, and a sliding window in the upper layers where switched on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.models.config import ModelConfig
from brlite.models.families.family import Family
from brlite.models.families.hf_config import ConfigReader, check_supported, read_sizes, read_sliding_layers
from brlite.models.families.llama import WEIGHT_NAMES

DEFAULT_WINDOW = 4096
DEFAULT_FULL_LAYERS = 28
CLASS_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}


def read_config(values: Mapping[str, Any], class_defaults: Mapping[str, Any] = CLASS_DEFAULTS) -> ModelConfig:
    reader = ConfigReader(values, class_defaults=class_defaults)
    check_supported(reader)
    # Every config of this family has a window; it is used only if `use_sliding_window` is true.
    has_window = reader.flag("use_sliding_window", False) and values.get("sliding_window", DEFAULT_WINDOW) is not None
    return ModelConfig(
        **read_sizes(reader),
        qkv_bias=True,
        sliding_window=reader.positive_int("sliding_window", DEFAULT_WINDOW) if has_window else None,
        sliding_layers=read_sliding_layers(reader, first=_num_full_layers(values)) if has_window else (),
    )


def _num_full_layers(values: Mapping[str, Any]) -> int:
    """How many of the lowest layers have no sliding window; 0 is allowed."""
    count = values.get("max_window_layers", DEFAULT_FULL_LAYERS)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ConfigReader(values).error("max_window_layers", "an integer of at least 0", count)
    return count


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read_config, WEIGHT_NAMES)

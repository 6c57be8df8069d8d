"""Qwen1.5 and Qwen2: Llama with biases on q, k and v, and a sliding window in the upper layers where switched on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.models.config import ModelConfig
from brlite.models.families.family import Family
from brlite.models.families.hf_config import ConfigReader, read_sizes, read_window
from brlite.models.families.llama import WEIGHT_NAMES

DEFAULT_WINDOW = 4096
DEFAULT_FULL_LAYERS = 28
CLASS_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}


def read_config(values: Mapping[str, Any], class_defaults: Mapping[str, Any] = CLASS_DEFAULTS) -> ModelConfig:
    reader = ConfigReader(values, class_defaults=class_defaults)
    # Every config of this family has a window; it is used only if `use_sliding_window` is true.
    has_window = reader.flag("use_sliding_window", False) and values.get("sliding_window", DEFAULT_WINDOW) is not None
    num_full = values.get("max_window_layers", DEFAULT_FULL_LAYERS)  # the lowest layers, which have no window; may be 0
    if has_window and (type(num_full) is not int or num_full < 0):
        raise reader.error("max_window_layers", "an integer of at least 0", num_full)
    window = read_window(reader, DEFAULT_WINDOW, first=num_full) if has_window else {}
    return ModelConfig(**read_sizes(reader), **window, qkv_bias=True)


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read_config, WEIGHT_NAMES)

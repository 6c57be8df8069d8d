"""Mistral: Llama with a sliding window in every layer, if its config names one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.models.config import ModelConfig
from brlite.models.families.family import Family
from brlite.models.families.hf_config import ConfigReader, read_sizes, read_window
from brlite.models.families.llama import WEIGHT_NAMES

DEFAULT_WINDOW = 4096
CLASS_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(values, class_defaults=CLASS_DEFAULTS)
    # null: no window. A config without the key is one of Mistral 7B v0.1, which has a window.
    has_window = values.get("sliding_window", DEFAULT_WINDOW) is not None
    return ModelConfig(**read_sizes(reader), **(read_window(reader, DEFAULT_WINDOW) if has_window else {}))


MISTRAL = Family("mistral", "MistralForCausalLM", read_config, WEIGHT_NAMES)

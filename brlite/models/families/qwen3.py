"""Qwen3: Qwen2 with a norm on each head of queries and keys, and without biases unless its config asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from brlite.models.config import ModelConfig
from brlite.models.families import qwen2
from brlite.models.families.family import Family
from brlite.models.families.hf_config import ConfigReader
from brlite.models.families.llama import WEIGHT_NAMES

CLASS_DEFAULTS = {**qwen2.CLASS_DEFAULTS, "head_dim": 128}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    has_bias = ConfigReader(values).flag("attention_bias", False)
    return msgspec.structs.replace(
        qwen2.read_config(values, CLASS_DEFAULTS), qkv_bias=has_bias, o_bias=has_bias, qk_norm=True
    )


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", read_config, WEIGHT_NAMES)

"""SmolLM3: Llama without rotary positions in every fourth layer (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from brlite.models.config import ModelConfig
from brlite.models.families import llama
from brlite.models.families.family import Family
from brlite.models.families.hf_config import ConfigReader

DEFAULT_INTERVAL = 4
CLASS_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(values)
    if reader.flag("use_sliding_window", False):
        raise reader.error("use_sliding_window", "false", True)
    config = llama.read_config(values, CLASS_DEFAULTS)
    num_layers, flags = config.num_layers, values.get("no_rope_layers")
    # The layers without rotary positions: those with 0 in `no_rope_layers`, else the last of each interval.
    if flags is None:
        interval = reader.positive_int("no_rope_layer_interval", DEFAULT_INTERVAL)
        return msgspec.structs.replace(config, nope_layers=tuple(range(interval - 1, num_layers, interval)))
    if not isinstance(flags, list) or len(flags) != num_layers or any(flag not in (0, 1) for flag in flags):
        raise reader.error("no_rope_layers", f"a list of {num_layers} zeros and ones", flags)
    nope_layers = tuple(layer for layer, flag in enumerate(flags) if flag == 0)
    return msgspec.structs.replace(config, nope_layers=nope_layers)


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", read_config, llama.WEIGHT_NAMES)

"""Baichuan2 7B: Llama with q, k and v in one matrix, as many key heads as query heads, and a head of unit rows.

The 13B models of the same architecture have linear biases (ALiBi) in place of rotary positions and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.errors import ModelError
from brlite.models.config import ModelConfig
from brlite.models.families import llama
from brlite.models.families.family import Family, WeightNames
from brlite.models.families.hf_config import ConfigReader, read_sizes

WEIGHT_NAMES: WeightNames = {**llama.WEIGHT_NAMES, "qkv": "model.layers.{}.self_attn.W_pack"}
ALIBI_HIDDEN_SIZE = 5120  # of both 13B models, whose configs have no key for ALiBi


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(values)
    # Only the 7B models have `max_position_embeddings`; the 13B ones have another key for their context.
    if "max_position_embeddings" not in reader or reader.positive_int("hidden_size") == ALIBI_HIDDEN_SIZE:
        raise ModelError(
            "model config: Baichuan 13B has ALiBi in place of rotary positions, which is not supported; Baichuan2 7B is"
        )
    if reader.flag("tie_word_embeddings", False):
        raise reader.error("tie_word_embeddings", "false: the head is scaled, the embedding is not", True)
    return ModelConfig(**read_sizes(reader))


BAICHUAN = Family("baichuan", "BaichuanForCausalLM", read_config, WEIGHT_NAMES, unit_rows=("head.weight",))

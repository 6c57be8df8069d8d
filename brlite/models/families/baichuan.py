"""Baichuan2 7B: Llama with q, k and v in one matrix, as many key heads as query heads, and a head of unit rows.

The 13B models of the same architecture have linear biases (ALiBi) in place of rotary positions and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brlite.errors import ModelError
from brlite.models.config import ModelConfig
from brlite.models.families.family import Family, WeightTarget
from brlite.models.families.hf_config import ConfigReader, check_supported, read_sizes
from brlite.models.families.llama import weight_targets as llama_targets

SPLIT = ("q_proj.weight", "k_proj.weight", "v_proj.weight")  # what W_pack takes the place of
ALIBI_HIDDEN_SIZE = 5120  # of both 13B models; their configs say nothing of positions, which is how they say ALiBi


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    reader = ConfigReader(values)
    _check_rotary(reader)
    check_supported(reader)
    if reader.flag("tie_word_embeddings", False):
        raise reader.error("tie_word_embeddings", "false: the head is scaled, the embedding is not", True)
    return ModelConfig(**read_sizes(reader))


def weight_targets(config: ModelConfig) -> dict[str, WeightTarget]:
    """Llama's names, but for `W_pack`, which has the rows of q, k and v."""
    targets = {name: target for name, target in llama_targets(config).items() if not name.endswith(SPLIT)}
    targets["lm_head.weight"] = WeightTarget("head.weight", (config.vocab_size, config.hidden_size), has_unit_rows=True)
    for layer in range(config.num_layers):
        shape = (config.q_size + 2 * config.kv_size, config.hidden_size)
        targets[f"model.layers.{layer}.self_attn.W_pack.weight"] = WeightTarget(f"layers.{layer}.qkv.weight", shape)
    return targets


def _check_rotary(reader: ConfigReader) -> None:
    """Only the 7B models name `max_position_embeddings`; the 13B ones call the length they were made for otherwise."""
    if "max_position_embeddings" not in reader or reader.positive_int("hidden_size") == ALIBI_HIDDEN_SIZE:
        raise ModelError(
            "model config: Baichuan 13B has ALiBi in place of rotary positions, which is not supported; Baichuan2 7B is"
        )


BAICHUAN = Family("baichuan", "BaichuanForCausalLM", read_config, weight_targets)

"""Llama and CodeLlama. Its weight names are those of most Llama-shaped families, which import them from here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from brlite.models.config import ModelConfig
from brlite.models.families.family import Family, WeightTarget
from brlite.models.families.hf_config import ConfigReader, check_supported, read_sizes

CLASS_DEFAULTS = {"max_position_embeddings": 2048}


def read_config(values: Mapping[str, Any], class_defaults: Mapping[str, Any] = CLASS_DEFAULTS) -> ModelConfig:
    reader = ConfigReader(values, class_defaults=class_defaults)
    check_supported(reader)
    attention_bias = reader.flag("attention_bias", False)
    return ModelConfig(
        **read_sizes(reader),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=reader.flag("mlp_bias", False),
    )


def weight_targets(config: ModelConfig) -> dict[str, WeightTarget]:
    """Every tensor a checkpoint must hold, by its name there."""
    vocabulary = (config.vocab_size, config.hidden_size)
    targets = {
        "model.embed_tokens.weight": WeightTarget("embedding", vocabulary),
        "model.norm.weight": WeightTarget("norm", (config.hidden_size,)),
    }
    if not config.tie_word_embeddings:
        targets["lm_head.weight"] = WeightTarget("head.weight", vocabulary)
    for layer in range(config.num_layers):
        targets.update(_layer_targets(config, f"model.layers.{layer}.", f"layers.{layer}."))
    return targets


def _layer_targets(config: ModelConfig, source: str, target: str) -> Iterator[tuple[str, WeightTarget]]:
    hidden, q, kv, mlp = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    yield f"{source}input_layernorm.weight", WeightTarget(f"{target}attention_norm", (hidden,))
    yield f"{source}post_attention_layernorm.weight", WeightTarget(f"{target}mlp_norm", (hidden,))
    if config.qk_norm:
        yield f"{source}self_attn.q_norm.weight", WeightTarget(f"{target}q_norm", (config.head_dim,))
        yield f"{source}self_attn.k_norm.weight", WeightTarget(f"{target}k_norm", (config.head_dim,))

    linears = (
        ("self_attn.q_proj", "qkv", 0, q, hidden, config.qkv_bias),
        ("self_attn.k_proj", "qkv", q, kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", "qkv", q + kv, kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", "o", 0, hidden, q, config.o_bias),
        ("mlp.gate_proj", "gate_up", 0, mlp, hidden, config.mlp_bias),
        ("mlp.up_proj", "gate_up", mlp, mlp, hidden, config.mlp_bias),
        ("mlp.down_proj", "down", 0, hidden, mlp, config.mlp_bias),
    )
    for name, parameter, start, num_outputs, num_inputs, has_bias in linears:
        yield f"{source}{name}.weight", WeightTarget(f"{target}{parameter}.weight", (num_outputs, num_inputs), start)
        if has_bias:
            yield f"{source}{name}.bias", WeightTarget(f"{target}{parameter}.bias", (num_outputs,), start)


LLAMA = Family("llama", "LlamaForCausalLM", read_config, weight_targets)

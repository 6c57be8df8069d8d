"""What transformers' config classes have where a config.json leaves a key out: the same logits without each key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from brlite.backends.torch.loading import load_model
from brlite.config.options import ModelSpec
from brlite.errors import ModelError
from brlite.models.registry import FAMILIES, find_family
from tests.load_plans import make_plan
from tests.models.steps import DEVICE, LENGTH, Runner, random_ids
from tests.tiny_models import LLAMA, TensorCheckpoint, random_tensors, write_model

# What may stay required: the sizes of the network, and what says which network it is.
REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
NO_DEFAULT = {"pad_token_id"}  # beyond a tiny vocabulary
# Keys that stand outside the class's fields, for older files.
OLD_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
# Values that no class has by default. 32 heads, since that many key and value heads are the default of two classes.
FULL: dict[str, Any] = {
    **LLAMA,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "hidden_size": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 700.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**FULL, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    "mistral": {**FULL, "sliding_window": 11, "head_dim": 6},
    "qwen2": {**FULL, **WINDOW},
    "qwen3": {**FULL, **WINDOW, "attention_bias": True, "head_dim": 6},
    "smollm3": {
        **FULL,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "no_rope_layers": [0, 1, 1, 1],
        "no_rope_layer_interval": 3,
        "num_hidden_layers": 4,
    },
    "phi3": {**FULL, "sliding_window": 11, "original_max_position_embeddings": 128},
}
ARCHITECTURES = {family.model_type: family.architecture for family in FAMILIES}


def class_keys(model_type: str) -> list[str]:
    own = [field.name for field in fields(CONFIG_MAPPING[model_type])]
    return sorted({*own, *OLD_KEYS} & CONFIGS[model_type].keys() - REQUIRED - NO_DEFAULT)


CASES = [(name, (key,)) for name in CONFIGS for key in class_keys(name)]
CASES += [(name, tuple(class_keys(name))) for name in CONFIGS]


def config_without(model_type: str, keys: tuple[str, ...]) -> dict[str, Any]:
    config = {**CONFIGS[model_type], "model_type": model_type, "architectures": [ARCHITECTURES[model_type]]}
    return {key: value for key, value in config.items() if key not in keys}


def tensors_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights with a small embedding, so that the norms' epsilon shows."""
    tensors = random_tensors(config)
    tensors["model.embed_tokens.weight"] /= 64
    return tensors


@pytest.mark.parametrize(("model_type", "keys"), CASES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_key_that_is_left_out_means_what_it_means_in_transformers(
    model_type: str, keys: tuple[str, ...], tmp_path: Path
) -> None:
    config, token_ids = config_without(model_type, keys), random_ids()
    write_model(tmp_path, config)
    tensors = tensors_of(config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]

    spec = ModelSpec(name=model_type, build_seq=LENGTH)
    decoder = load_model(make_plan(TensorCheckpoint(config, tensors), spec), torch.float32, DEVICE)
    logits = Runner(decoder).whole(token_ids, range(LENGTH))

    assert (logits - expected).abs().max().item() <= 1e-4
    family = find_family(config)
    assert family.read_config(config).max_position_embeddings == reference.config.max_position_embeddings


def test_every_family_that_transformers_has_is_among_the_cases() -> None:
    assert {family.model_type for family in FAMILIES if family.model_type in CONFIG_MAPPING} == set(CONFIGS)


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_a_size_that_is_left_out_is_missing(key: str) -> None:
    config = config_without("llama", (key,))

    with pytest.raises(ModelError, match=f"{key} is missing"):
        find_family(config).read_config(config)

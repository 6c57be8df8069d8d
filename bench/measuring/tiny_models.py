"""Tiny checkpoints with random weights, one for each architecture and for each twist that a config can have.

Configs are written as they stand on the hub. Weights are exact in bfloat16, so that a decoder that rounds to it and a
reference in float32 compute with the same numbers. The tests and `card.py --check` use them; needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from brlite.checkpoint.stored_tensor import from_bfloat16, to_bfloat16
from brlite.models.registry import find_family

VOCAB_SIZE = 300

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
BAICHUAN = {
    **{key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rope_theta")},
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "model_max_length": 128,
    "pad_token_id": 0,
    "z_loss_weight": 0,
}
CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 96,
    "fp32_residual_connection": False,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": VOCAB_SIZE,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN3 = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 24,
    "attention_bias": False,
}
SMOLLM3 = {
    **LLAMA,
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "no_rope_layers": [1, 0, 1],
    "no_rope_layer_interval": 2,
    "use_sliding_window": False,
    "pad_token_id": 0,
}
PHI3 = {
    **LLAMA,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "sliding_window": 11,
    "original_max_position_embeddings": 128,
    "pad_token_id": 0,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {**LLAMA, "head_dim": 24},
    "llama-linear-rope": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-dynamic-rope": {
        **LLAMA,
        "max_position_embeddings": 24,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    },
    "llama3-rope": {**LLAMA, "rope_scaling": LLAMA3},
    "qwen2-yarn-rope": {**QWEN2, "rope_scaling": YARN},
    "rope-parameters": {**LLAMA, "rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5000.0}},
    "mistral": MISTRAL,
    "mistral-window": {**MISTRAL, "sliding_window": 11},
    "mistral-head-dim": {**MISTRAL, "head_dim": 24},
    "qwen2": QWEN2,
    "qwen2-window": {**QWEN2, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    "qwen2-layer-types": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": QWEN3,
    "qwen3-biases": {**QWEN3, "attention_bias": True, "tie_word_embeddings": True},
    "smollm3": SMOLLM3,
    "smollm3-interval": {**SMOLLM3, "no_rope_layers": None, "num_hidden_layers": 4},
    "phi3": PHI3,
    "phi3-partial-rope": {**PHI3, "partial_rotary_factor": 0.75, "sliding_window": None},
    "baichuan": BAICHUAN,
    "chatglm": CHATGLM,
    "chatglm-rope-ratio": {**CHATGLM, "rope_ratio": 50},
}


def random_arrays(config: dict[str, Any], *, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    family = find_family(config)
    targets = family.weight_targets(family.read_config(config))
    # In the order of names: another order of targets changes no number.
    return {name: _random(name, targets[name].shape, generator) for name in sorted(targets)}


def write_model(path: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(random_arrays(config, seed=seed), path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_byte_tokenizer(path: Path) -> None:
    """A tokenizer of one token a byte beside a model, which its 300 embeddings cover."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + index for index, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


def _random(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> npt.NDArray[np.float32]:
    values = generator.standard_normal(shape, np.float32)
    # Large enough that a slip in attention or rope shows in the logits, small enough that nothing saturates.
    scaled = 1 + 0.1 * values if name.endswith("norm.weight") else 0.15 * values
    return from_bfloat16(to_bfloat16(scaled))

"""Translates GGUF's metadata into a Hugging Face `config.json`, and GGUF's tensor names into parameter names.

Reads no files and no tensor data. Metadata that a `config.json` cannot express is refused, not dropped. Keys and names
are those of the GGUF specification and of llama.cpp (gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from brlite.errors import ModelError
from brlite.files.quoting import excerpt
from brlite.models.families.hf_config import DEFAULT_THETA, ConfigReader, read_rope

# GGUF architecture → the keys that name the family. Mistral's files are of the architecture llama too.
ARCHITECTURES = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "cls.output": "score",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSOR_PATTERN = re.compile(r"(?:blk\.(?P<layer>\d{1,4})\.)?(?P<part>[\w.]+)\.(?P<kind>weight|bias)")
ROPE_FREQS = "rope_freqs.weight"

SCALING_KEYS = ("type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow")
# A GGUF file has only the divisors that follow from these parameters. Every published Llama 3 uses the same.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufMetadata(ConfigReader):
    """The keys of the file's architecture, without its name before them. `whole` has all keys as they are."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.whole = ConfigReader(values)
        self.architecture = self.whole.text("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise self.whole.error("general.architecture", f"one of {', '.join(ARCHITECTURES)}", self.architecture)
        prefix = f"{self.architecture}."
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        super().__init__(own, prefix)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    match = TENSOR_PATTERN.fullmatch(name)
    layer, part = (match["layer"], match["part"]) if match else (None, name)
    known = TENSOR_NAMES if layer is None else LAYER_NAMES
    if match is None or part not in known:
        raise ModelError(f"tensor {excerpt(name)} is not one of a Llama-shaped model")
    prefix = "" if layer is None else f"model.layers.{int(layer)}."
    return f"{prefix}{known[part]}.{match['kind']}"


def hugging_face_config(
    metadata: GgufMetadata, shapes: dict[str, tuple[int, ...]], rope_freqs: Sequence[float] | None
) -> dict[str, Any]:
    """The `config.json` of a model with these tensors (by Hugging Face's names) and Llama 3's frequency divisors."""
    if "expert_count" in metadata:
        raise ModelError(f"{metadata.architecture}.expert_count: mixtures of experts are not supported")
    # The metadata's vocab_size is optional, and smaller than the embedding in padded models.
    embedding = shapes.get("model.embed_tokens.weight", ())
    if len(embedding) != 2:
        raise ModelError("tensor 'token_embd.weight' is missing or not a matrix")
    num_heads = metadata.positive_int("attention.head_count")
    hidden_size = metadata.positive_int("embedding_length")
    config: dict[str, Any] = {
        **ARCHITECTURES[metadata.architecture],
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.positive_int("feed_forward_length"),
        "num_hidden_layers": metadata.positive_int("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.positive_int("attention.head_count_kv", num_heads),
        "head_dim": _head_dim(metadata, hidden_size // num_heads),
        "rms_norm_eps": metadata.positive_number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.positive_number("rope.freq_base", DEFAULT_THETA),
        "max_position_embeddings": metadata.positive_int("context_length"),
        "vocab_size": embedding[0],
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in shapes,
        **_special_tokens(metadata),
    }
    if "attention.sliding_window" in metadata:
        window = {"sliding_window": metadata.positive_int("attention.sliding_window")}
        is_mistral = metadata.architecture == "llama"
        config |= window | (MISTRAL if is_mistral else {"use_sliding_window": True, "max_window_layers": 0})
    if metadata.value("pooling_type") not in (None, 0):  # 0 is no pooling in llama.cpp
        config["pooling_type"] = metadata.positive_int("pooling_type")
    if not metadata.flag("attention.causal", True):
        config["is_causal"] = False
    if "score.weight" in shapes:
        config |= _scorer(metadata, config)
    return config | _rope_scaling(metadata, config, rope_freqs)


def _head_dim(metadata: GgufMetadata, default: int) -> int:
    head_dim = metadata.positive_int("attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.positive_int(key, head_dim) != head_dim:
            raise metadata.error(key, f"{head_dim}, the size of a head", metadata.value(key))
    return head_dim


def _scorer(metadata: GgufMetadata, config: dict[str, Any]) -> dict[str, Any]:
    """What makes the config that of a reranker: its class, the labels of its head, and its template of a pair."""
    key = "classifier.output_labels"
    labels = metadata.texts(key) if key in metadata else ["LABEL_0"]
    architecture = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    template = metadata.whole.text("tokenizer.chat_template.rerank", "")
    return {
        "architectures": [architecture],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        **({"score_template": template} if template else {}),
    }


def _special_tokens(metadata: GgufMetadata) -> dict[str, Any]:
    def find(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = metadata.whole.value(key)
        if token_id is not None and (type(token_id) is not int or token_id < 0):
            raise metadata.whole.error(key, "a token id", token_id)
        return token_id

    eos, eot, bos = map(find, ("eos", "eot", "bos"))
    ends = [token_id for token_id in dict.fromkeys((eos, eot)) if token_id is not None]
    tokens: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    return tokens if bos is None else {**tokens, "bos_token_id": bos}


def _rope_scaling(metadata: GgufMetadata, config: dict[str, Any], rope_freqs: Sequence[float] | None) -> dict[str, Any]:
    """The key `rope_scaling` of config.json; nothing for a model without it."""
    for key in metadata:
        if key.startswith("rope.scaling.") and key.removeprefix("rope.scaling.") not in SCALING_KEYS:
            name = excerpt(f"{metadata.architecture}.{key}")
            raise ModelError(f"{name}: this kind of rope scaling is not supported")
    kind = metadata.text("rope.scaling.type", "linear" if "rope.scale_linear" in metadata else "none")
    if kind not in ("none", "linear", "yarn"):
        raise metadata.error("rope.scaling.type", "none, linear or yarn", kind)
    if rope_freqs is not None and any(divisor != 1.0 for divisor in rope_freqs):
        if kind != "none":
            raise ModelError(f"{ROPE_FREQS} and rope scaling of type {excerpt(kind)} cannot be combined")
        # llama.cpp keeps the result of Llama 3's scaling, not its parameters: find the factor, and compute it again.
        if not all(0 < divisor < math.inf for divisor in rope_freqs):
            raise ModelError(f"{ROPE_FREQS} must hold finite divisors above 0")
        scaling: dict[str, Any] = {"rope_type": "llama3", "factor": round(max(rope_freqs), 3), **LLAMA3_SCALING}
        if not _follow_from(rope_freqs, {**config, "rope_scaling": scaling}):
            found = f"does not hold Llama 3's rope scaling with factor {scaling['factor']:g}; no other is known"
            raise ModelError(f"{ROPE_FREQS} {found}")
        return {"rope_scaling": scaling}
    if kind == "none":
        return {}
    factor = metadata.positive_number("rope.scaling.factor", metadata.value("rope.scale_linear"))
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = metadata.positive_int("rope.scaling.original_context_length", config["max_position_embeddings"])
        scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in metadata:
                scaling[name] = metadata.positive_number(f"rope.scaling.yarn_{name}")
    return {"rope_scaling": scaling}


def _follow_from(divisors: Sequence[float], config: dict[str, Any]) -> bool:
    """Whether the scaling of a config divides the frequencies by these numbers."""
    if len(divisors) != -(-config["head_dim"] // 2):  # first: the size of a head is only what the file claims
        return False
    import numpy as np

    from brlite.models.rope_tables import inverse_frequencies

    plain = inverse_frequencies(read_rope(ConfigReader({**config, "rope_scaling": None})), 0)
    scaled = inverse_frequencies(read_rope(ConfigReader(config)), 0)
    return bool(np.allclose(plain / scaled, divisors, rtol=1e-3, atol=0))

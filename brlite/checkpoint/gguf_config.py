"""Translates GGUF's metadata into a Hugging Face `config.json`, and GGUF's tensor names into parameter names.

Reads no files and no tensor data. Metadata that a `config.json` cannot express is refused, not dropped. Keys and names
are those of the GGUF specification and of llama.cpp (gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from brlite.errors import ModelError
from brlite.files.quoting import excerpt

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


class GgufMetadata:
    """Typed access to the metadata of one architecture. Errors name the key."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.architecture = self.text("general.architecture")
        if self.architecture not in ARCHITECTURES:
            allowed = ", ".join(ARCHITECTURES)
            raise ModelError(f"general.architecture is {excerpt(self.architecture)}; allowed are {allowed}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise ModelError(f"{key} must be a string, got {excerpt(value)}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The unchecked value of a key, which is relative to the architecture, as in `count`, `number` and `has`."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(f"{self.architecture}.{key} must be a whole number above 0, got {excerpt(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ModelError(f"{self.architecture}.{key} must be a number above 0, got {excerpt(value)}")
        return float(value)

    def token_id(self, name: str) -> int | None:
        """The id of a special token, such as eos; None if the file does not name it."""
        value = self.values.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or value < 0):
            raise ModelError(f"tokenizer.ggml.{name}_token_id must be a token id, got {excerpt(value)}")
        return value

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.values


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
    if metadata.has("expert_count"):
        raise ModelError(f"{metadata.architecture}.expert_count: mixtures of experts are not supported")
    # The metadata's vocab_size is optional, and smaller than the embedding in padded models.
    embedding = shapes.get("model.embed_tokens.weight", ())
    if len(embedding) != 2:
        raise ModelError("tensor 'token_embd.weight' is missing or not a matrix")
    num_heads = metadata.count("attention.head_count")
    hidden_size = metadata.count("embedding_length")
    config: dict[str, Any] = {
        **ARCHITECTURES[metadata.architecture],
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", num_heads),
        "head_dim": _head_dim(metadata, hidden_size // num_heads),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "max_position_embeddings": metadata.count("context_length"),
        "vocab_size": embedding[0],
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in shapes,
        **_special_tokens(metadata),
    }
    if metadata.has("attention.sliding_window"):
        window = {"sliding_window": metadata.count("attention.sliding_window")}
        is_mistral = metadata.architecture == "llama"
        config |= window | (MISTRAL if is_mistral else {"use_sliding_window": True, "max_window_layers": 0})
    pooling, is_causal = metadata.get("pooling_type", 0), metadata.get("attention.causal", True)
    for key, value, kind in (("pooling_type", pooling, int), ("attention.causal", is_causal, bool)):
        if type(value) is not kind:
            raise ModelError(f"{metadata.architecture}.{key} must be of type {kind.__name__}, got {excerpt(value)}")
    if pooling != 0:  # 0 is no pooling in llama.cpp
        config["pooling_type"] = pooling
    if not is_causal:
        config["is_causal"] = False
    if "score.weight" in shapes:
        config |= _scorer(metadata, config)
    return config | _rope_scaling(metadata, config, rope_freqs)


def llama3_divisors(factor: float, head_dim: int, rope_theta: float) -> list[float]:
    """What Llama 3 divides each rope frequency by: 1 for short waves, `factor` for long ones, smooth in between."""
    low, high = LLAMA3_SCALING["low_freq_factor"], LLAMA3_SCALING["high_freq_factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        wave_length = 2 * math.pi * rope_theta ** (i / head_dim)
        turns = LLAMA3_SCALING["original_max_position_embeddings"] / wave_length
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def _head_dim(metadata: GgufMetadata, default: int) -> int:
    head_dim = metadata.count("attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.count(key, head_dim) != head_dim:
            raise ModelError(f"{metadata.architecture}.{key} must equal the head size {head_dim}")
    return head_dim


def _scorer(metadata: GgufMetadata, config: dict[str, Any]) -> dict[str, Any]:
    """What makes the config that of a reranker: its class, the labels of its head, and its template of a pair."""
    key = f"{metadata.architecture}.classifier.output_labels"
    labels = metadata.values.get(key, ["LABEL_0"])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f"{key} must be a list of strings, got {excerpt(labels)}")
    architecture = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    template = metadata.text("tokenizer.chat_template.rerank", "")
    return {
        "architectures": [architecture],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        **({"score_template": template} if template else {}),
    }


def _special_tokens(metadata: GgufMetadata) -> dict[str, Any]:
    eos, eot, bos = (metadata.token_id(name) for name in ("eos", "eot", "bos"))
    ends = [token_id for token_id in dict.fromkeys((eos, eot)) if token_id is not None]
    tokens: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    return tokens if bos is None else {**tokens, "bos_token_id": bos}


def _rope_scaling(metadata: GgufMetadata, config: dict[str, Any], rope_freqs: Sequence[float] | None) -> dict[str, Any]:
    """The key `rope_scaling` of config.json; nothing for a model without it."""
    prefix = f"{metadata.architecture}.rope.scaling."
    unknown = [key for key in metadata.values if key.startswith(prefix) and key[len(prefix) :] not in SCALING_KEYS]
    if unknown:
        raise ModelError(f"{excerpt(unknown[0])}: this kind of rope scaling is not supported")
    kind = metadata.text(prefix + "type", "linear" if metadata.has("rope.scale_linear") else "none")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"{prefix}type is {excerpt(kind)}; allowed are none, linear and yarn")
    if rope_freqs is not None and max(rope_freqs, default=1.0) != 1.0:
        if kind != "none":
            raise ModelError(f"{ROPE_FREQS} and rope scaling of type {excerpt(kind)} cannot be combined")
        # llama.cpp keeps the result of Llama 3's scaling, not its parameters: find the factor, and compute it again.
        if not all(0 < divisor < math.inf for divisor in rope_freqs):
            raise ModelError(f"{ROPE_FREQS} must hold finite divisors above 0")
        factor = round(max(rope_freqs), 3)
        same = len(rope_freqs) == -(-config["head_dim"] // 2) and all(  # before a list of the claimed length is made
            math.isclose(a, b, rel_tol=1e-3)
            for a, b in zip(llama3_divisors(factor, config["head_dim"], config["rope_theta"]), rope_freqs, strict=True)
        )
        if not same:
            found = f"does not hold Llama 3's rope scaling with factor {factor:g}; no other is known"
            raise ModelError(f"{ROPE_FREQS} {found}")
        return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}}
    if kind == "none":
        return {}
    factor = metadata.number("rope.scaling.factor", metadata.get("rope.scale_linear"))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = metadata.count("rope.scaling.original_context_length", metadata.count("context_length"))
        scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if metadata.has(f"rope.scaling.yarn_{name}"):
                scaling[name] = metadata.number(f"rope.scaling.yarn_{name}")
    return {"rope_scaling": scaling}

"""ChatGLM3 from its papers and model card, for one dense sequence: slow, obvious, and none of brlite's.

Weights stand as the checkpoint holds them: q, k and v in one matrix, gate and up in another, neighbours turn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


def logits(config: dict[str, Any], weights: Weights, token_ids: list[int]) -> Tensor:
    """The logits [T, V] at every position."""
    hidden = weights["transformer.embedding.word_embeddings.weight"][torch.tensor(token_ids)]
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        part = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        hidden = hidden + _attention(config, part, _norm(config, hidden, part["input_layernorm.weight"]))
        hidden = hidden + _mlp(part, _norm(config, hidden, part["post_attention_layernorm.weight"]))
    hidden = _norm(config, hidden, weights["transformer.encoder.final_layernorm.weight"])
    return hidden @ weights["transformer.output_layer.weight"].T


def _norm(config: dict[str, Any], hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / torch.sqrt((hidden**2).mean(-1, keepdim=True) + config["layernorm_epsilon"]) * weight


def _attention(config: dict[str, Any], part: Weights, hidden: Tensor) -> Tensor:
    num_heads, num_groups, length = config["num_attention_heads"], config["multi_query_group_num"], len(hidden)
    mixed = functional.linear(
        hidden, part["self_attention.query_key_value.weight"], part["self_attention.query_key_value.bias"]
    )
    heads = mixed.view(length, num_heads + 2 * num_groups, config["kv_channels"]).transpose(0, 1)
    query, key, value = heads.split((num_heads, num_groups, num_groups))  # each [heads, T, D]
    shared_by = num_heads // num_groups
    key, value = (_rotate(config, key).repeat_interleave(shared_by, 0), value.repeat_interleave(shared_by, 0))
    scores = _rotate(config, query) @ key.transpose(1, 2) / math.sqrt(config["kv_channels"])
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, -1)
    return attended @ part["self_attention.dense.weight"].T


def _rotate(config: dict[str, Any], heads: Tensor) -> Tensor:
    """Neighbours in the first half of each head turn by their position; the second half stays."""
    size = config["kv_channels"] // 2
    base = 10_000.0 * config.get("rope_ratio", 1)
    angles = torch.outer(torch.arange(heads.shape[1]).float(), base ** (-torch.arange(0, size, 2) / size))
    even, odd = heads[..., 0:size:2], heads[..., 1:size:2]
    turned = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
    return torch.cat((torch.stack(turned, dim=-1).flatten(-2), heads[..., size:]), dim=-1)


def _mlp(part: Weights, hidden: Tensor) -> Tensor:
    gate, up = (hidden @ part["mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
    return (functional.silu(gate) * up) @ part["mlp.dense_4h_to_h.weight"].T

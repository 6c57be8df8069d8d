"""Baichuan2 7B from its technical report and model card, for one dense sequence: slow, obvious, and none of brlite's.

Weights stand as the checkpoint holds them, with `W_pack` and a head that is normalised when it is used.
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
    hidden = weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        part = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        hidden = hidden + _attention(config, part, _norm(config, hidden, part["input_layernorm.weight"]))
        hidden = hidden + _mlp(part, _norm(config, hidden, part["post_attention_layernorm.weight"]))
    hidden = _norm(config, hidden, weights["model.norm.weight"])
    # The published model holds its normalised head in bfloat16, like all else.
    return hidden @ functional.normalize(weights["lm_head.weight"], dim=1).bfloat16().float().T


def _norm(config: dict[str, Any], hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / torch.sqrt((hidden**2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def _attention(config: dict[str, Any], part: Weights, hidden: Tensor) -> Tensor:
    num_heads, length = config["num_attention_heads"], len(hidden)
    packed = hidden @ part["self_attn.W_pack.weight"].T
    query, key, value = (  # each [heads, T, D]
        third.view(length, num_heads, -1).transpose(0, 1) for third in packed.chunk(3, dim=-1)
    )
    scores = _rotate(query) @ _rotate(key).transpose(1, 2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, -1)
    return attended @ part["self_attn.o_proj.weight"].T


def _rotate(heads: Tensor) -> Tensor:
    """Pairs of the first half and the second half of a head turn by their position."""
    size = heads.shape[-1]
    angles = torch.outer(torch.arange(heads.shape[1]).float(), 10_000.0 ** (-torch.arange(0, size, 2) / size))
    first, second = heads[..., : size // 2], heads[..., size // 2 :]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def _mlp(part: Weights, hidden: Tensor) -> Tensor:
    gate, up = (hidden @ part[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return (functional.silu(gate) * up) @ part["mlp.down_proj.weight"].T

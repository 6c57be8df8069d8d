"""Writes a model anew with its channels in another order: it computes the same, but no group of 32 weights is kept.

The default model is a file of 4 bits. Rounding it to 4 bits again would find the file's own groups and cost nothing.
Residual stream, MLP and the values of each head may be put in any order, alike in all matrices that they go through.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from brlite.checkpoint import open_checkpoint

Order = npt.NDArray[np.int64]


def write_mixed(source: Path, folder: Path) -> None:
    """Write the Llama of the folder `source` to `folder`, which must not exist, in bfloat16."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint = open_checkpoint(source)
    tensors = {}
    for tensor in checkpoint.tensors():
        values = tensor.float32()
        rows, columns = _orders(tensor.name, checkpoint.config)
        values = values if rows is None else values[rows]
        values = values if columns is None else values[:, columns]
        tensors[tensor.name] = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _orders(name: str, config: dict[str, Any]) -> tuple[Order | None, Order | None]:
    """The orders of a tensor's rows and of its columns; None: as they are."""
    hidden = _random_order(config["hidden_size"], seed=0)
    layer, kind = (name.split(".")[index] for index in (2, -2)) if ".layers." in name else ("0", name.split(".")[-2])
    mlp = _random_order(config["intermediate_size"], seed=int(layer))
    values, repeated = _head_orders(config, seed=int(layer))
    match kind:
        case "embed_tokens" | "lm_head" | "q_proj" | "k_proj":
            return None, hidden
        case "v_proj":
            return values, hidden
        case "o_proj":
            return hidden, repeated
        case "gate_proj" | "up_proj":
            return mlp, hidden
        case "down_proj":
            return hidden, mlp
        case "norm" | "input_layernorm" | "post_attention_layernorm":
            return hidden, None
        case _:
            raise ValueError(f"{name} is no tensor of a Llama without biases")


def _head_orders(config: dict[str, Any], *, seed: int) -> tuple[Order, Order]:
    """The order of values [kv heads · D], and of what attention makes of them [heads · D]."""
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // num_heads
    heads = [_random_order(size, seed=seed * num_kv_heads + head) for head in range(num_kv_heads)]
    group = num_heads // num_kv_heads
    return (
        np.concatenate([head * size + order for head, order in enumerate(heads)]),
        np.concatenate([head * size + heads[head // group] for head in range(num_heads)]),
    )


def _random_order(size: int, *, seed: int) -> Order:
    return np.random.default_rng(seed).permutation(size)

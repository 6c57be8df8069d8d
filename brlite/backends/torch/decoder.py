"""Runs a network in torch, over a flat batch of tokens. Each operation is bound to its tensors once, at loading.

Matrices multiply in the parameters' type; norms, rotary positions, the residual stream and logits are float32. Nothing
here waits for the device. There are no sequences here: a `StepPlan` says which cached tokens each row sees. Operations
hold no reference to their decoder: in a cycle the tensors of a closed model would wait for the garbage collector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from brlite.backends.torch.attention import StepPlan, attend
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parameters import Linear, Parameters
from brlite.backends.torch.rope import RopeTables, rope_tables, rotate_
from brlite.models.config import ModelConfig
from brlite.models.network import Attend, Embed, Gate, HeadNorm, Multiply, Norm, Operation, Rotate, build_network


@dataclass
class RunningStep:
    """The data that a step's operations share: `hidden` [T, H] is the residual stream, `rope` rotates its rows."""

    hidden: Tensor
    plan: StepPlan
    cache: KVCache
    rope: RopeTables


# Its input is the output of the operation before it; the input of the first is token ids [T].
BoundOperation = Callable[[Tensor, RunningStep], Tensor]


class Decoder:
    """A loaded model: its config, its parameters and the rotary tables of `max_length` positions."""

    def __init__(self, config: ModelConfig, parameters: Parameters, *, max_length: int) -> None:
        self.config = config
        self.parameters = parameters
        self.dtype = parameters.named["embedding"].dtype
        self.device = parameters.named["embedding"].device
        self._rope = rope_tables(config.rope, max_length, self.device)
        self._network = build_network(config)
        self._body = [self._bind(operation) for operation in self._network.body]

    def forward(self, token_ids: Tensor, plan: StepPlan, cache: KVCache) -> Tensor:
        """Compute `token_ids` [T], in the plan's order; store their keys and values; return hidden states [T, H]."""
        if plan.begun_blocks.numel():
            cache.clear(plan.begun_blocks)
        step = RunningStep(token_ids, plan, cache, self._rope.at(plan.positions))
        x = token_ids
        for operation in self._body:
            x = operation(x, step)
        return step.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The vocabulary's logits [R, V] in float32 for rows [R, H] that `forward` returned."""
        return self.parameters.linears[self._network.head.name](self.normed(hidden).to(self.dtype)).float()

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of rows [R, H] that `forward` returned, in float32: the input of the head."""
        norm = self._network.norm
        return _normed(hidden, self.parameters.named[norm.weight.name], norm.epsilon)

    def _bind(self, operation: Operation) -> BoundOperation:
        named, linears, config = self.parameters.named, self.parameters.linears, self.config
        match operation:
            case Embed():
                return partial(_embed, self.parameters)
            case Norm():
                return partial(_norm, named[operation.weight.name], operation.epsilon, self.dtype)
            case Multiply(output="hidden"):
                return partial(_add, linears[operation.name])
            case Multiply():
                return partial(_multiply, linears[operation.name])
            case HeadNorm():
                query, key = named[operation.query.name], named[operation.key.name]
                weights = torch.stack([query] * config.num_heads + [key] * config.num_kv_heads)
                return partial(_norm_heads, weights, operation.epsilon)
            case Rotate():
                return partial(_rotate, config)
            case Attend():
                return partial(_attend, config, operation)
            case Gate():
                return _gate


def _normed(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    scale = torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + epsilon)
    return (rows * scale).mul_(weight)


def _embed(parameters: Parameters, token_ids: Tensor, step: RunningStep) -> Tensor:
    step.hidden = parameters.look_up(token_ids)
    return step.hidden


def _norm(weight: Tensor, epsilon: float, dtype: torch.dtype, _: Tensor, step: RunningStep) -> Tensor:
    return _normed(step.hidden, weight, epsilon).to(dtype)


def _norm_heads(weights: Tensor, epsilon: float, qkv: Tensor, _: RunningStep) -> Tensor:
    heads = _heads(qkv, weights.shape[1])[:, : len(weights)]  # [T, Hq + Hk, D]
    heads.copy_(_normed(heads.float(), weights, epsilon))
    return qkv


def _rotate(config: ModelConfig, qkv: Tensor, step: RunningStep) -> Tensor:
    rotate_(_heads(qkv, config.head_dim)[:, : -config.num_kv_heads], step.rope)
    return qkv


def _attend(config: ModelConfig, operation: Attend, qkv: Tensor, step: RunningStep) -> Tensor:
    num_heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    query, key, value = _heads(qkv, config.head_dim).split_with_sizes(num_heads, dim=1)
    cache = step.cache.layers[operation.layer]
    cache.keys.write(step.plan.slots, key)
    cache.values.write(step.plan.slots, value)
    return attend(query, cache, step.plan, operation.window)


def _heads(qkv: Tensor, head_dim: int) -> Tensor:
    return qkv.view(len(qkv), -1, head_dim)


def _multiply(linear: Linear, x: Tensor, _: RunningStep) -> Tensor:
    return linear(x)


def _add(linear: Linear, x: Tensor, step: RunningStep) -> Tensor:
    step.hidden += linear(x)
    return step.hidden


def _gate(gate_up: Tensor, _: RunningStep) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)

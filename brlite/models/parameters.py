"""A decoder's parameters: plain tensors in plain structures, named as in `config.parameter_shapes`. No mathematics.

Whoever runs the decoder, here or in native code, finds every tensor by its layer and name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from brlite.models.config import ModelConfig, parameter_shapes


@dataclass(frozen=True)
class Linear:
    """A matrix [outputs, inputs] and maybe a bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class LayerParameters:
    """One layer. `qkv` stacks the rows of q, k and v, `gate_up` those of gate and up. Norms are float32.

    `q_norm` and `k_norm` [D] are of one head each, for models that have them.
    """

    attention_norm: Tensor
    qkv: Linear
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.o, self.gate_up, self.down)


@dataclass(frozen=True)
class Parameters:
    """All of a decoder. `named` holds every tensor once; with tied embeddings `head.weight` is `embedding`.

    Matrices that were packed (`packing.py`) are no longer in `named`, but counted.
    """

    named: dict[str, Tensor]
    embedding: Tensor
    layers: list[LayerParameters]
    norm: Tensor
    head: Linear
    num_packed_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.named.values()) + self.num_packed_bytes


def allocate_parameters(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Memory for every parameter, not yet filled: norms in float32, the rest in `dtype`."""
    named = {
        name: torch.empty(shape, dtype=torch.float32 if name.endswith("norm") else dtype, device=device)
        for name, shape in parameter_shapes(config).items()
    }
    return Parameters(
        named=named,
        embedding=named["embedding"],
        layers=[_layer(named, f"layers.{layer}.") for layer in range(config.num_layers)],
        norm=named["norm"],
        head=Linear(named.get("head.weight", named["embedding"])),
    )


def _layer(named: dict[str, Tensor], prefix: str) -> LayerParameters:
    def linear(name: str) -> Linear:
        return Linear(named[f"{prefix}{name}.weight"], named.get(f"{prefix}{name}.bias"))

    return LayerParameters(
        attention_norm=named[f"{prefix}attention_norm"],
        qkv=linear("qkv"),
        o=linear("o"),
        mlp_norm=named[f"{prefix}mlp_norm"],
        gate_up=linear("gate_up"),
        down=linear("down"),
        q_norm=named.get(f"{prefix}q_norm"),
        k_norm=named.get(f"{prefix}k_norm"),
    )

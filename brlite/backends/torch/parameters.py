"""A decoder's parameters: plain tensors in plain structures, named as in `config.parameter_shapes`. No mathematics.

Whoever runs the decoder, here or in native code, finds every tensor by its layer and name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from brlite.models.config import QUANTIZATION_GROUP, ModelConfig, is_quantized, parameter_dtype, parameter_shapes

MAX_DEQUANTIZED = 2**26  # weights at a time: 128 MiB in bfloat16


@dataclass(frozen=True)
class Linear:
    """A matrix [outputs, inputs] and maybe a bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Int8Linear(Linear):
    """A matrix that stays int8 in memory: `weight` [outputs, groups · 32] and `scales` [outputs, groups].

    It is dequantised anew for each product, some rows at a time; columns beyond its inputs hold zeros.
    """

    scales: Tensor = field(kw_only=True)

    def __call__(self, x: Tensor) -> Tensor:
        num_missing = self.weight.shape[1] - x.shape[-1]
        if num_missing:
            x = functional.pad(x, (0, num_missing))
        step = max(1, MAX_DEQUANTIZED // self.weight.shape[1])
        parts = [self._product(x, slice(start, start + step)) for start in range(0, len(self.weight), step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _product(self, x: Tensor, rows: slice) -> Tensor:
        scales = self.scales[rows].to(x.dtype).unsqueeze(-1)  # [rows, groups, 1]
        weight = self.weight[rows].view(*scales.shape[:2], -1).to(x.dtype).mul_(scales).flatten(1)
        return functional.linear(x, weight, None if self.bias is None else self.bias[rows])


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

    Matrices that stay int8 have their scales there, as `scales_name` calls them. Matrices that were packed
    (`packing.py`) are no longer in `named`, but counted.
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

    def look_up(self, token_ids: Tensor) -> Tensor:
        """The embeddings [T, H] of `token_ids` [T], in float32."""
        return functional.embedding(token_ids, self.embedding).float()


def scales_name(weight: str) -> str:
    """What the scales of the int8 matrix `weight` are called."""
    return f"{weight}.scales"


def allocate_parameters(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, *, keeps_int8: bool = False
) -> Parameters:
    """Memory for every parameter, not yet filled: norms in float32, the rest in `dtype`.

    With `keeps_int8` the matrices of linear layers are `Int8Linear`s, but for a head that is the embedding too.
    """
    named: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(config).items():
        if keeps_int8 and is_quantized(name):
            num_groups = -(-shape[1] // QUANTIZATION_GROUP)
            columns = num_groups * QUANTIZATION_GROUP
            named[name] = torch.zeros((shape[0], columns), dtype=torch.int8, device=device)
            named[scales_name(name)] = torch.zeros((shape[0], num_groups), dtype=torch.bfloat16, device=device)
        else:
            named[name] = torch.empty(
                shape, dtype=torch.float32 if parameter_dtype(name) == "float32" else dtype, device=device
            )
    return Parameters(
        named=named,
        embedding=named["embedding"],
        layers=[_layer(named, f"layers.{layer}.") for layer in range(config.num_layers)],
        norm=named["norm"],
        head=_linear(named, "head") if "head.weight" in named else Linear(named["embedding"]),
    )


def _linear(named: dict[str, Tensor], name: str) -> Linear:
    weight, bias, scales = (named.get(f"{name}.{part}") for part in ("weight", "bias", scales_name("weight")))
    assert weight is not None
    return Linear(weight, bias) if scales is None else Int8Linear(weight, bias, scales=scales)


def _layer(named: dict[str, Tensor], prefix: str) -> LayerParameters:
    def linear(name: str) -> Linear:
        return _linear(named, f"{prefix}{name}")

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

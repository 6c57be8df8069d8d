"""A decoder's parameters: plain tensors in plain structures, named as in `models/network.py`. No network."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from brlite.models.config import QUANTIZATION_GROUP, ModelConfig
from brlite.models.network import build_network, list_parameters

MAX_DEQUANTIZED = 2**26  # weights dequantized at a time: 128 MiB in bfloat16


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

    It is dequantized for each product, some rows at a time; columns beyond its inputs hold zeros.
    """

    scales: Tensor = field(kw_only=True)

    def __call__(self, x: Tensor) -> Tensor:
        num_missing = self.weight.shape[1] - x.shape[-1]
        if num_missing:
            x = functional.pad(x, (0, num_missing))
        step, parts = max(1, MAX_DEQUANTIZED // self.weight.shape[1]), list[Tensor]()
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            scales = self.scales[rows].to(x.dtype).unsqueeze(-1)  # [rows, groups, 1]
            weight = self.weight[rows].view(*scales.shape[:2], -1).to(x.dtype).mul_(scales).flatten(1)
            parts.append(functional.linear(x, weight, None if self.bias is None else self.bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Parameters:
    """A decoder's parameters. `named` holds every tensor once, `linears` the `Linear` of each multiplication by name.

    With tied embeddings the head's weight is the embedding. Matrices that stay int8 have their scales in `named`, by
    `scales_name`. Packed matrices (`packing.py`) are no longer in `named`, but are counted.
    """

    named: dict[str, Tensor]
    linears: dict[str, Linear]
    num_packed_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.named.values()) + self.num_packed_bytes

    def look_up(self, token_ids: Tensor) -> Tensor:
        """The embeddings [T, H] of `token_ids` [T], in float32."""
        return functional.embedding(token_ids, self.named["embedding"]).float()


def scales_name(weight: str) -> str:
    """The name of the scales of the int8 matrix `weight`."""
    return f"{weight}.scales"


def allocate_parameters(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, *, keeps_int8: bool = False
) -> Parameters:
    """Memory for every parameter, not yet filled: norms in float32, the rest in `dtype`.

    With `keeps_int8` the matrices of linear layers are `Int8Linear`s, except a head that is also the embedding.
    """
    named: dict[str, Tensor] = {}
    for name, parameter in list_parameters(config).items():
        if keeps_int8 and parameter.precision == "weights" and not parameter.is_looked_up:
            num_outputs, num_groups = parameter.shape[0], -(-parameter.shape[1] // QUANTIZATION_GROUP)
            values_shape = (num_outputs, num_groups * QUANTIZATION_GROUP)
            named[name] = torch.zeros(values_shape, dtype=torch.int8, device=device)
            named[scales_name(name)] = torch.zeros((num_outputs, num_groups), dtype=torch.bfloat16, device=device)
        else:
            its_dtype = torch.float32 if parameter.precision == "float32" else dtype
            named[name] = torch.empty(parameter.shape, dtype=its_dtype, device=device)
    linears = {}
    for operation in build_network(config).multiplications:
        weight, scales = named[operation.weight.name], named.get(scales_name(operation.weight.name))
        bias = named[operation.bias.name] if operation.bias else None
        linears[operation.name] = Linear(weight, bias) if scales is None else Int8Linear(weight, bias, scales=scales)
    return Parameters(named, linears)

"""A decoder's parameters: plain tensors in plain structures, named as in `models/network.py`. No network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from brlite.models.config import QUANTIZATION_GROUP, ModelConfig
from brlite.models.network import build_network, list_parameters
from brlite.models.precision import INT4_FORMS, MatrixForm

MAX_DEQUANTIZED = 2**25  # weights dequantized at a time: 128 MiB in float32
NO_FORMS: Mapping[str, MatrixForm] = MappingProxyType({})


@dataclass(frozen=True)
class Linear:
    """A matrix [outputs, inputs] and maybe a bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True)
class GroupedLinear(Linear):
    """A matrix that is held in `form`, in groups of 32 inputs. Inputs beyond the matrix's own are zeros.

    * "int8": `weight` int8 [outputs, groups · 32], `scales` float32 [outputs, groups], numbers that bfloat16 has.
    * Codes of a quantized file: `scales` float16 [outputs, groups, 2] are scale and offset. The offset is a minimum in
      "int4_min", else the code of 0. 8-bit codes are int8. A byte of 4-bit codes holds those of inputs i and i + 16:
      `weight` uint8 [outputs, groups · 16].

    A matrix is dequantized for each product, some rows at a time.
    """

    form: MatrixForm
    scales: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        num_inputs = self.scales.shape[1] * QUANTIZATION_GROUP
        if num_inputs > x.shape[-1]:
            x = functional.pad(x, (0, num_inputs - x.shape[-1]))
        step, parts = max(1, MAX_DEQUANTIZED // num_inputs), list[Tensor]()
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            weight = self.dequantized(rows, x.dtype)
            parts.append(functional.linear(x, weight, None if self.bias is None else self.bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The weights of some outputs, [R, groups · 32]: computed in float32 and rounded once."""
        codes = self.weight[rows].view(*self.scales[rows].shape[:2], -1)  # [R, groups, 16 or 32]
        if self.form == "int8":
            return codes.to(dtype).mul_(self.scales[rows].to(dtype).unsqueeze(-1)).flatten(1)
        if self.form in INT4_FORMS:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        scales, offsets = self.scales[rows].float().chunk(2, dim=-1)
        if self.form == "int4_min":
            return codes.float().mul_(scales).add_(offsets).to(dtype).flatten(1)
        return codes.float().sub_(offsets).mul_(scales).to(dtype).flatten(1)


@dataclass(frozen=True)
class Parameters:
    """A decoder's parameters. `named` holds every tensor once, `linears` the `Linear` of each multiplication by name.

    With tied embeddings the head's weight is the embedding. A `GroupedLinear` has its scales in `named`, by
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
    """The name of the scales of the matrix `weight`."""
    return f"{weight}.scales"


def allocate_parameters(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, forms: Mapping[str, MatrixForm] = NO_FORMS
) -> Parameters:
    """Memory for every parameter, not yet filled: matrices in their `forms`, norms in float32, the rest in `dtype`."""
    named: dict[str, Tensor] = {}
    for name, parameter in list_parameters(config).items():
        if name in forms:
            num_outputs, num_groups = parameter.shape[0], -(-parameter.shape[1] // QUANTIZATION_GROUP)
            is_int4, is_int8 = forms[name] in INT4_FORMS, forms[name] == "int8"
            codes_shape = (num_outputs, num_groups * QUANTIZATION_GROUP // (2 if is_int4 else 1))
            named[name] = torch.zeros(codes_shape, dtype=torch.uint8 if is_int4 else torch.int8, device=device)
            scales_shape = (num_outputs, num_groups, *(() if is_int8 else (2,)))
            named[scales_name(name)] = torch.zeros(
                scales_shape, dtype=torch.float32 if is_int8 else torch.float16, device=device
            )
        else:
            its_dtype = torch.float32 if parameter.precision == "float32" else dtype
            named[name] = torch.empty(parameter.shape, dtype=its_dtype, device=device)
    linears = {}
    for operation in build_network(config).multiplications:
        name, bias = operation.weight.name, named[operation.bias.name] if operation.bias else None
        linears[operation.name] = (
            GroupedLinear(named[name], bias, form=forms[name], scales=named[scales_name(name)])
            if name in forms
            else Linear(named[name], bias)
        )
    return Parameters(named, linears)

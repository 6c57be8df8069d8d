"""int8 weights as a pass over the plain model: symmetric, one scale for each output row and 32 of its inputs.

Every linear layer is quantized, the head included, and with it a tied embedding. Norms, biases and an embedding that
is only looked up are not. Some devices keep int8 (`GroupedLinear`). On the others, and for a tied embedding, torch
holds the dequantized weights: the values are those of int8, but memory is not saved.

Native code quantizes by the same rules to the same bytes:

    weight   rounded to bfloat16 first
    scale    bfloat16: the group's largest magnitude / 127 in float32, rounded up to the next bfloat16, so that no
             value exceeds 127
    value    int8: weight / scale in float32, rounded to the nearest, halves to the even one

A group of zeros has the scale 0. A `GroupedLinear` has scales in float32, since cards load four bytes at a time best.
Codes of quantized files are not rounded: `store_codes_` writes them as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from brlite.backends.torch.parameters import GroupedLinear, Parameters, scales_name
from brlite.checkpoint.stored_tensor import Coded
from brlite.models.config import QUANTIZATION_GROUP
from brlite.models.precision import INT4_FORMS, MatrixForm

INT4_ZERO_CODE = 8  # the code of 0 where a file has no other

ROWS_AT_A_TIME = 4096  # bounds the float32 copies that quantizing makes
LOWER_HALF = 0xFFFF  # the bits of a float32 that bfloat16 drops


class QuantizedWeight(NamedTuple):
    """`values` int8 [outputs, inputs] and `scales` bfloat16 [outputs, groups]; the last group may be shorter."""

    values: Tensor
    scales: Tensor


def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """Round each weight to its group's nearest level. A weight that is not finite makes the scale not finite too."""
    groups = _grouped(weight.to(torch.bfloat16).float())  # [outputs, groups, 32]
    bits = (groups.abs().amax(dim=-1) / 127).view(torch.int32)
    scales = ((bits + LOWER_HALF) & ~LOWER_HALF).view(torch.float32)  # rounded up to a bfloat16
    divisors = torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    values = (groups / divisors).round_().to(torch.int8)
    return QuantizedWeight(values.flatten(1)[:, : weight.shape[1]].contiguous(), scales.to(torch.bfloat16))


def dequantize_weight(weight: QuantizedWeight) -> Tensor:
    """The exact float32 matrix of `weight`."""
    products = _grouped(weight.values.float()) * weight.scales.float().unsqueeze(-1)
    return products.flatten(1)[:, : weight.values.shape[1]]


def quantize_linears_(parameters: Parameters) -> None:
    """Round the weights of all linear layers that are not kept in int8 to the values of int8, in place."""
    for linear in parameters.linears.values():
        if not isinstance(linear, GroupedLinear):
            for rows in _row_blocks(linear.weight):
                rows.copy_(dequantize_weight(quantize_weight(rows.cpu())))


def store_rows_(parameters: Parameters, name: str, start: int, weights: Tensor) -> None:
    """Write `weights` to rows `start` onwards of a parameter. If it is kept in int8, quantize them on the host."""
    parameter, scales = parameters.named[name], parameters.named.get(scales_name(name))
    if scales is None:
        parameter[start : start + len(weights)].copy_(weights)
        return
    for rows in _row_blocks(weights):
        quantized = quantize_weight(rows)
        parameter[start : start + len(rows), : rows.shape[1]].copy_(quantized.values)
        scales[start : start + len(rows)].copy_(quantized.scales)
        start += len(rows)


def store_codes_(parameters: Parameters, name: str, start: int, coded: Coded) -> None:
    """Write a file's codes to rows `start` onwards of a `GroupedLinear`'s matrix."""
    parameter, scales = parameters.named[name], parameters.named[scales_name(name)]
    rows, codes = slice(start, start + len(coded.codes)), torch.from_numpy(coded.codes)
    is_int4 = parameter.dtype == torch.uint8
    if is_int4:
        halves = codes.view(len(codes), -1, 2, QUANTIZATION_GROUP // 2)
        parameter[rows].copy_((halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1))
    else:
        parameter[rows].copy_(codes.view(torch.int8))
    scales[rows, :, 0].copy_(torch.from_numpy(coded.scales.view(np.float16)))
    if coded.offsets is None:
        scales[rows, :, 1].fill_(INT4_ZERO_CODE if is_int4 else 0)
    else:
        scales[rows, :, 1].copy_(torch.from_numpy(coded.offsets.view(np.float16)))


def random_codes(form: MatrixForm, shape: tuple[int, ...], generator: torch.Generator) -> Coded:
    """Codes, scales and offsets of a matrix [outputs, inputs] whose weights have a spread near 1 / sqrt(inputs)."""
    num_outputs, num_groups = shape[0], -(-shape[1] // QUANTIZATION_GROUP)
    top = 16 if form in INT4_FORMS else 256
    codes = torch.randint(0, top, (num_outputs, num_groups * QUANTIZATION_GROUP), generator=generator)
    scales = (1 + torch.rand((num_outputs, num_groups), generator=generator)) * 2.4 / top / shape[1] ** 0.5
    offsets: Tensor | None = None
    if form == "int4_min":
        offsets = -INT4_ZERO_CODE * scales
    elif form == "int4_zero":
        offsets = torch.randint(6, 11, scales.shape, generator=generator).float()
    halves = (None if each is None else each.half().numpy().view(np.uint16) for each in (scales, offsets))
    return Coded(codes.to(torch.uint8).numpy(), *halves)  # type: ignore[arg-type]


def _row_blocks(matrix: Tensor) -> list[Tensor]:
    return [matrix[start : start + ROWS_AT_A_TIME] for start in range(0, matrix.shape[0], ROWS_AT_A_TIME)]


def _grouped(matrix: Tensor) -> Tensor:
    """[outputs, inputs] as [outputs, groups, 32], filled up with zeros."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % QUANTIZATION_GROUP))
    return padded.view(matrix.shape[0], -1, QUANTIZATION_GROUP)

"""int8 weights as a pass over the plain model: symmetric, one scale for each output row and 32 of its inputs.

Every linear layer is quantized, the head included, and with it a tied embedding. Norms, biases and an embedding that
is only looked up are not. Some devices keep int8 (`Int8Linear`). On the others, and for a tied embedding, torch holds
the dequantized weights: the values are those of int8, but memory is not saved.

Native code quantizes by the same rules to the same bytes:

    weight   rounded to bfloat16 first
    scale    bfloat16: the group's largest magnitude / 127 in float32, rounded up to the next bfloat16, so that no
             value exceeds 127
    value    int8: weight / scale in float32, rounded to the nearest, halves to the even one

A group of zeros has the scale 0. 32 values and a scale take 34 bytes: 1.0625 a weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from brlite.backends.torch.parameters import Int8Linear, Parameters, scales_name
from brlite.models.config import QUANTIZATION_GROUP

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
        if not isinstance(linear, Int8Linear):
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


def _row_blocks(matrix: Tensor) -> list[Tensor]:
    return [matrix[start : start + ROWS_AT_A_TIME] for start in range(0, matrix.shape[0], ROWS_AT_A_TIME)]


def _grouped(matrix: Tensor) -> Tensor:
    """[outputs, inputs] as [outputs, groups, 32], filled up with zeros."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % QUANTIZATION_GROUP))
    return padded.view(matrix.shape[0], -1, QUANTIZATION_GROUP)

"""int8 weights as a pass over the plain model: symmetric, one scale for each output row and 32 of its inputs.

Every linear layer is quantised, the head included, and with it a tied embedding. Norms, biases and an embedding that
is only looked up are not. In torch the weights are then held dequantised: the numbers of int8, not its memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from brlite.models.config import QUANTIZATION_GROUP
from brlite.models.parameters import Parameters

ROWS_AT_A_TIME = 4096  # bounds the float32 copies that quantising makes


class QuantizedWeight(NamedTuple):
    """`values` int8 [outputs, inputs] and `scales` float32 [outputs, groups]; the last group may be shorter."""

    values: Tensor
    scales: Tensor


def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """Round to the nearest of 255 levels, the largest of a group being ±127. A group of zeros stays zero."""
    groups = _grouped(weight.float())  # [outputs, groups, 32]
    scales = groups.abs().amax(dim=-1) / 127
    safe = torch.where(scales == 0, 1.0, scales)
    values = (groups / safe.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(values.flatten(1)[:, : weight.shape[1]].contiguous(), scales)


def dequantize_weight(weight: QuantizedWeight) -> Tensor:
    """The float32 matrix that `weight` stands for."""
    products = _grouped(weight.values.float()) * weight.scales.unsqueeze(-1)
    return products.flatten(1)[:, : weight.values.shape[1]]


def quantize_linears_(parameters: Parameters) -> None:
    """Replace the weights of all linear layers by what int8 makes of them, in place."""
    for linear in (*(linear for layer in parameters.layers for linear in layer.linears), parameters.head):
        for rows in _row_blocks(linear.weight):
            rows.copy_(dequantize_weight(quantize_weight(rows)))


def _row_blocks(matrix: Tensor) -> list[Tensor]:
    return [matrix[start : start + ROWS_AT_A_TIME] for start in range(0, matrix.shape[0], ROWS_AT_A_TIME)]


def _grouped(matrix: Tensor) -> Tensor:
    """[outputs, inputs] as [outputs, groups, 32], filled up with zeros."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % QUANTIZATION_GROUP))
    return padded.view(matrix.shape[0], -1, QUANTIZATION_GROUP)

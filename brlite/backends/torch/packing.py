"""Matrices in oneDNN's own layout as a pass over the plain model: steps of a few rows are a quarter faster.

torch does not document the two operators. If they are missing, or if a packed product differs from the plain one, the
matrices stay plain. The head stays plain too, since a tied embedding is looked up in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brlite.backends.torch.parameters import Linear, Parameters

EXPECTED_ROWS = 16  # a hint of how many rows to multiply; other numbers are right too
TOLERANCE = 2e-2  # relative, for bfloat16 sums in another order


@dataclass(frozen=True)
class PackedLinear(Linear):
    """A `Linear` whose weight only oneDNN can read."""

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


def can_pack(parameters: Parameters) -> bool:
    """Whether this torch can pack the matrices, and a packed layer gives the same products as a plain one."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    if not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    try:
        for name, linear in parameters.linears.items():
            if name.startswith("layers.0."):
                rows = torch.linspace(-1, 1, 3 * linear.weight.shape[1]).view(3, -1).to(linear.weight.dtype)
                expected = linear(rows)
                if not (_pack(linear)(rows) - expected).abs().max() <= TOLERANCE * expected.abs().max():
                    return False
        return True
    except RuntimeError:  # a type or a processor that oneDNN does not support
        return False


def pack_linears(parameters: Parameters) -> Parameters:
    """The parameters with the layers' matrices packed, one at a time, and removed from `named`.

    The plain matrices are freed: `parameters` cannot be used any more.
    """
    num_bytes = parameters.num_bytes
    for name in parameters.linears:
        if name != "head":
            parameters.linears[name] = _pack(parameters.linears[name])
            del parameters.named[f"{name}.weight"]
    return replace(parameters, num_packed_bytes=num_bytes - parameters.num_bytes)


def _pack(linear: Linear) -> PackedLinear:
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(linear.weight, EXPECTED_ROWS), linear.bias)

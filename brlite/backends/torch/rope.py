"""Rotary positions in torch: tables in the layout of a head, and the rotation. `models/rope_tables.py` has the angles.

A pair (a, b) rotated by an angle is (a·cos - b·sin, b·cos + a·sin). The sine table contains the minus sign, so that a
rotation is head · cosines + (head with swapped pairs) · sines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brlite.models.config import RopeConfig
from brlite.models.rope_tables import pair_tables


@dataclass(frozen=True)
class RopeTables:
    """Cosines and signed sines, each [positions, rotary_dim]."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def at(self, positions: Tensor) -> RopeTables:
        """The rows of `positions` [T], shaped [T, 1, rotary_dim] to broadcast over heads."""
        cos, sin = (table.index_select(0, positions).unsqueeze(1) for table in (self.cos, self.sin))
        return RopeTables(cos, sin, self.interleaved)


def rope_tables(rope: RopeConfig, length: int, device: torch.device) -> RopeTables:
    """The tables for positions 0 to `length` - 1."""
    cos, sin = (torch.from_numpy(table) for table in pair_tables(rope, length))  # [positions, rotary_dim / 2]
    stack_dim = -1 if rope.interleaved else -2
    return RopeTables(
        torch.stack((cos, cos), dim=stack_dim).flatten(-2).to(device),
        torch.stack((-sin, sin), dim=stack_dim).flatten(-2).to(device),
        rope.interleaved,
    )


def rotate_(heads: Tensor, tables: RopeTables) -> None:
    """Rotate `heads` [T, H, D] in place, computing in float32. Dimensions beyond the tables' width are unchanged."""
    rotary = heads[..., : tables.cos.shape[-1]]
    if tables.interleaved:
        swapped = rotary.reshape(*rotary.shape[:-1], -1, 2).flip(-1).flatten(-2)
    else:
        swapped = rotary.roll(rotary.shape[-1] // 2, dims=-1)
    rotary.copy_(torch.addcmul(rotary * tables.cos, swapped, tables.sin))

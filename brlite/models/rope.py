"""Rotary positions: cosines and sines as real float32 tables, made once, and the turn itself.

A pair (a, b) turned by an angle is (a·cos - b·sin, b·cos + a·sin). The tables are laid out like a head, the minus sign
stands in the sine table, so that a turn is two products with the head and with its pairs swapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brlite.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
)


@dataclass(frozen=True)
class RopeTables:
    """Cosines and signed sines, each [positions, rotary_dim]."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def at(self, positions: Tensor) -> RopeTables:
        """The rows of `positions` [T], shaped [T, 1, rotary_dim] to go over heads."""
        cos, sin = (table.index_select(0, positions).unsqueeze(1) for table in (self.cos, self.sin))
        return RopeTables(cos, sin, self.interleaved)


def rope_tables(rope: RopeConfig, length: int, device: torch.device) -> RopeTables:
    """The tables for positions 0 to `length` - 1.

    Dynamic scaling is evaluated at `length`, once: a token's keys never depend on how long its sequence has grown.
    """
    frequencies = inverse_frequencies(rope, length)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)  # [positions, rotary_dim / 2]
    magnitude = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    stack_dim = -1 if rope.interleaved else -2
    return RopeTables(
        torch.stack((cos, cos), dim=stack_dim).flatten(-2).to(device),
        torch.stack((-sin, sin), dim=stack_dim).flatten(-2).to(device),
        rope.interleaved,
    )


def rotate_(heads: Tensor, tables: RopeTables) -> None:
    """Turn `heads` [T, H, D] in place, computing in float32. Dimensions beyond the tables' width stay as they are."""
    rotary = heads[..., : tables.cos.shape[-1]]
    turned = torch.addcmul(rotary * tables.cos, _swap_pairs(rotary, interleaved=tables.interleaved), tables.sin)
    rotary.copy_(turned)


def _swap_pairs(heads: Tensor, *, interleaved: bool) -> Tensor:
    if interleaved:
        return heads.reshape(*heads.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return heads.roll(heads.shape[-1] // 2, dims=-1)


def inverse_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """Radians per position of each pair [rotary_dim / 2], scaled for a context of `length` as the model wants."""
    if isinstance(rope.scaling, DynamicScaling):
        return _frequencies(_dynamic_theta(rope, rope.scaling, length), rope.rotary_dim)
    frequencies = _frequencies(rope.theta, rope.rotary_dim)
    return SCALINGS[type(rope.scaling)](frequencies, rope)


def _frequencies(theta: float, rotary_dim: int) -> Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return torch.pow(theta, exponents).reciprocal()


def _dynamic_theta(rope: RopeConfig, scaling: DynamicScaling, length: int) -> float:
    stretch = scaling.factor * max(length, scaling.original_positions) / scaling.original_positions
    return rope.theta * math.pow(stretch - (scaling.factor - 1), rope.rotary_dim / (rope.rotary_dim - 2))


def _unscaled(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    return frequencies


def _linear(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    assert isinstance(rope.scaling, LinearScaling)
    return frequencies / rope.scaling.factor


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    scaling = rope.scaling
    assert isinstance(scaling, Llama3Scaling)
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blend(frequencies / scaling.factor, frequencies, blend.clamp(0, 1))


def _yarn(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    scaling = rope.scaling
    assert isinstance(scaling, YarnScaling)
    low, high = (_yarn_dimension(rope, scaling, turns) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return _blend(frequencies, frequencies / scaling.factor, ramp.clamp(0, 1))


def _yarn_dimension(rope: RopeConfig, scaling: YarnScaling, turns: float) -> float:
    """The pair, as a real number, that turns `turns` times within the original context."""
    return rope.rotary_dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _blend(at_zero: Tensor, at_one: Tensor, weight: Tensor) -> Tensor:
    return at_zero * (1 - weight) + at_one * weight


SCALINGS: dict[type[Any], Callable[[Tensor, RopeConfig], Tensor]] = {
    type(None): _unscaled,
    LinearScaling: _linear,
    Llama3Scaling: _llama3,
    YarnScaling: _yarn,
}

"""The angles of rotary positions as cosines and sines, for torch and native code alike. Needs numpy only.

Powers, cosines and sines are rounded from float64, so that they are the same on every machine; all else is float32,
step by step as in transformers. The backends apply the rotation, each in its own layout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from brlite.models.config import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

Float32 = npt.NDArray[np.float32]


class PairTables(NamedTuple):
    """Cosines and sines, each [positions, rotary_dim / 2], multiplied by YaRN's attention factor."""

    cos: Float32
    sin: Float32


def pair_tables(rope: RopeConfig, length: int) -> PairTables:
    """The tables for positions 0 to `length` - 1.

    Dynamic scaling is evaluated once, at `length`, so that a token's keys do not depend on the length of its sequence.
    """
    angles = np.outer(np.arange(length, dtype=np.float32), inverse_frequencies(rope, length))
    magnitude = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    return PairTables(_rounded(np.cos, angles) * magnitude, _rounded(np.sin, angles) * magnitude)


def inverse_frequencies(rope: RopeConfig, length: int) -> Float32:
    """Radians per position of each pair [rotary_dim / 2], scaled by the config for a context of `length` tokens."""
    frequencies = _frequencies(rope.theta, rope.rotary_dim)
    match rope.scaling:
        case DynamicScaling(factor=factor, original_positions=original):
            stretch = factor * max(length, original) / original - (factor - 1)
            theta = rope.theta * math.pow(stretch, rope.rotary_dim / (rope.rotary_dim - 2))
            return _frequencies(theta, rope.rotary_dim)
        case LinearScaling(factor=factor):
            return frequencies / factor
        case Llama3Scaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_positions=original):
            turns = original * frequencies / (2 * math.pi)  # within the original context
            return _blend(frequencies / factor, frequencies, (turns - low) / (high - low))
        case YarnScaling():
            return _yarn(frequencies, rope, rope.scaling)
    return frequencies


def _rounded(function: np.ufunc, angles: Float32) -> Float32:
    """`function` in float64, rounded to float32: numpy's float32 cosines differ between processors."""
    out = np.empty_like(angles)
    function(angles, out=out, dtype=np.float64, casting="same_kind")
    return out


def _frequencies(theta: float, rotary_dim: int) -> Float32:
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim
    powers = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64))
    frequencies: Float32 = 1 / powers.astype(np.float32)
    return frequencies


def _yarn(frequencies: Float32, rope: RopeConfig, scaling: YarnScaling) -> Float32:
    # The pairs, as real numbers, that rotate `beta_fast` and `beta_slow` times within the original context.
    low, high = (
        rope.rotary_dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (np.arange(rope.rotary_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    return _blend(frequencies, frequencies / scaling.factor, ramp)


def _blend(at_zero: Float32, at_one: Float32, position: Float32) -> Float32:
    weight: Float32 = position.clip(0, 1)
    return at_zero * (1 - weight) + at_one * weight

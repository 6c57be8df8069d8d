"""The rotary turn against pairs turned one by one. What the turns do to logits is in `test_families.py`."""

from __future__ import annotations

import math

import pytest
import torch

from brlite.backends.torch.rope import rope_tables, rotate_
from brlite.models.config import RopeConfig

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_heads_turn_pair_by_pair_and_keep_what_is_not_rotary(interleaved: bool, rotary_dim: int) -> None:
    rope = RopeConfig(rotary_dim=rotary_dim, theta=100.0, interleaved=interleaved)
    heads = torch.randn(3, 2, 8)
    expected = heads.clone()
    positions = [0, 5, 2]
    for row, position in enumerate(positions):
        for pair in range(rotary_dim // 2):
            first = 2 * pair if interleaved else pair
            second = 2 * pair + 1 if interleaved else pair + rotary_dim // 2
            angle = position * 100.0 ** (-2 * pair / rotary_dim)
            a, b = heads[row, :, first], heads[row, :, second]
            expected[row, :, first] = a * math.cos(angle) - b * math.sin(angle)
            expected[row, :, second] = b * math.cos(angle) + a * math.sin(angle)

    rotate_(heads, rope_tables(rope, 6, DEVICE).at(torch.tensor(positions)))

    assert torch.allclose(heads, expected, atol=1e-6)

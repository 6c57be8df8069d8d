"""Rotary angles against transformers' frequencies and the standard library's cosines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from brlite.models.config import DynamicScaling, RopeConfig, YarnScaling
from brlite.models.registry import find_family
from brlite.models.rope_tables import inverse_frequencies, pair_tables
from tests.tiny_models import LLAMA

LENGTH = 6000
LAST_BITS = 3e-7
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (500_000.0, 128), (1_000_000.0, 80)])
def test_frequencies_and_tables_are_those_of_transformers(kind: str, theta: float, head_dim: int) -> None:
    parameters = {"rope_type": kind, "rope_theta": theta, **SCALINGS[kind]}
    values = {**LLAMA, "head_dim": head_dim, "max_position_embeddings": 4096, "rope_theta": None}
    rope = find_family(values).read_config({**values, "rope_parameters": parameters}).rope
    reference = LlamaConfig(head_dim=head_dim, max_position_embeddings=4096, rope_parameters=parameters)
    embedding = LlamaRotaryEmbedding(reference)
    cos, sin = (table[0, :, : head_dim // 2].numpy() for table in embedding(torch.zeros(1), torch.arange(LENGTH)[None]))

    frequencies, tables = inverse_frequencies(rope, LENGTH), pair_tables(rope, LENGTH)

    # torch's powers are not always rounded to the nearest: one may be off by its last bit, and an angle by its share.
    assert np.allclose(frequencies, embedding.inv_freq.numpy(), rtol=LAST_BITS, atol=0)
    assert np.allclose(tables.cos, cos, rtol=0, atol=LENGTH * LAST_BITS)
    assert np.allclose(tables.sin, sin, rtol=0, atol=LENGTH * LAST_BITS)


def test_tables_hold_the_float32_nearest_to_each_cosine_and_sine() -> None:
    rope = RopeConfig(rotary_dim=8, theta=100.0)

    tables = pair_tables(rope, 500)

    frequencies = inverse_frequencies(rope, 500)
    angles = [[float(np.float32(position) * frequency) for frequency in frequencies] for position in range(500)]
    assert tables.cos.dtype == tables.sin.dtype == np.float32
    assert np.array_equal(tables.cos, np.float32([[math.cos(angle) for angle in row] for row in angles]))
    assert np.array_equal(tables.sin, np.float32([[math.sin(angle) for angle in row] for row in angles]))


def test_magnitude_is_in_the_tables() -> None:
    scaling = YarnScaling(4.0, 32, 1.5, 32.0, 1.0, True)

    tables = pair_tables(RopeConfig(rotary_dim=8, scaling=scaling), 3)

    assert tables.cos[0].tolist() == [1.5] * 4
    assert np.allclose(tables.cos**2 + tables.sin**2, 1.5**2)


def test_dynamic_scaling_leaves_a_context_within_the_original_positions_alone() -> None:
    plain = RopeConfig(rotary_dim=8)
    dynamic = RopeConfig(rotary_dim=8, scaling=DynamicScaling(factor=4.0, original_positions=32))

    assert np.array_equal(inverse_frequencies(dynamic, 32), inverse_frequencies(plain, 32))
    assert not np.array_equal(inverse_frequencies(dynamic, 33), inverse_frequencies(plain, 33))

"""int8 weights against a slow, obvious oracle of one group, and what the pass over a model changes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brlite.backends.torch.quantize import dequantize_weight, quantize_linears_, quantize_weight
from brlite.models.config import FLOAT32_BYTES
from brlite.models.network import MatrixPart, list_parameters, native_weight_bytes, num_parameters
from tests.models.steps import load_tiny

# Every magnitude that a finite bfloat16 can have; 0x7F80 is infinity.
magnitudes = st.integers(0, 0x7F7F)
groups = st.lists(st.tuples(magnitudes, st.booleans()), min_size=1, max_size=40)


def from_bfloat16_bits(bits: int) -> float:
    return float(np.array(bits << 16, np.uint32).view(np.float32))


def quantize_group(weights: list[float]) -> tuple[float, list[int]]:
    """The scale and values of one group, number by number."""
    largest = np.float32(max(map(abs, weights))) / np.float32(127)
    if largest == 0:
        return 0.0, [0] * len(weights)
    scale_bits = next_bfloat16_bits(float(largest))
    scale = from_bfloat16_bits(scale_bits)
    return scale, [round(float(np.float32(weight) / np.float32(scale))) for weight in weights]


def next_bfloat16_bits(number: float) -> int:
    """The least bfloat16 that is not below `number`, found by halving."""
    low, high = 0, 0x7F80
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if from_bfloat16_bits(middle) >= number else (middle + 1, high)
    return low


@given(groups)
def test_a_row_is_quantized_as_each_of_its_groups_alone(row: list[tuple[int, bool]]) -> None:
    weights = [from_bfloat16_bits(bits) * (-1 if is_negative else 1) for bits, is_negative in row]

    quantized = quantize_weight(torch.tensor([weights]))

    expected = [quantize_group(weights[start : start + 32]) for start in range(0, len(weights), 32)]
    assert quantized.scales.dtype == torch.bfloat16
    assert quantized.scales.tolist() == [[scale for scale, _ in expected]]
    assert quantized.values.tolist() == [[value for _, values in expected for value in values]]


@given(magnitudes)
def test_a_scale_is_the_least_bfloat16_that_keeps_its_group_within_127(bits: int) -> None:
    largest = from_bfloat16_bits(bits)

    quantized = quantize_weight(torch.tensor([[largest, -largest]]))

    scale = float(quantized.scales)
    value = int(quantized.values[0, 0])
    assert quantized.values[0, 1] == -value
    assert value <= 127
    assert Fraction(scale) * Fraction(255, 2) >= Fraction(largest)
    if scale > 2**-126:  # below, bfloat16 has fewer digits
        assert value >= 126
        assert Fraction(scale) * Fraction(127) / (1 + Fraction(1, 128)) <= Fraction(largest)


@pytest.mark.parametrize("num_inputs", [32, 96, 40, 7])
def test_a_weight_comes_back_within_half_a_level_of_its_group(num_inputs: int) -> None:
    weight = torch.randn(5, num_inputs, generator=torch.Generator().manual_seed(0)).bfloat16().float()

    quantized = quantize_weight(weight)

    step = quantized.scales.float().repeat_interleave(32, dim=1)[:, :num_inputs]
    assert quantized.values.shape == weight.shape
    assert quantized.scales.shape == (5, math.ceil(num_inputs / 32))
    assert ((dequantize_weight(quantized) - weight).abs() <= step / 2 * 1.0001).all()


def test_weights_are_rounded_to_bfloat16_first() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))

    fine, coarse = quantize_weight(weight), quantize_weight(weight.bfloat16())

    assert torch.equal(fine.values, coarse.values)
    assert torch.equal(fine.scales, coarse.scales)


def test_halves_are_rounded_to_the_even_level() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])

    quantized = quantize_weight(weight)

    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.values.tolist() == [[127, 0, 2, 2, 0, -2, 126]]


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = 127.0

    quantized = quantize_weight(weight)

    assert quantized.scales.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert torch.equal(dequantize_weight(quantized), weight)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_not_hidden(broken: float) -> None:
    weight = torch.ones(1, 64)
    weight[0, 3] = broken

    back = dequantize_weight(quantize_weight(weight))

    assert not back[0, :32].isfinite().any()
    assert back[0, 32:].isfinite().all()


def test_the_pass_quantizes_every_linear_and_the_head_but_no_norm_and_no_lookup() -> None:
    decoder = load_tiny("qwen2")
    before = {name: tensor.clone() for name, tensor in decoder.parameters.named.items()}

    quantize_linears_(decoder.parameters)

    changed = {name for name, tensor in decoder.parameters.named.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith(".weight")}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_native_bytes_are_those_of_the_quantized_matrices_and_of_what_is_not_quantized(name: str) -> None:
    decoder = load_tiny(name)
    parameters, config = decoder.parameters, decoder.config

    matrices = [matrix for matrix in list_parameters(config).values() if matrix.precision == "weights"]
    parts = {matrix.name: (MatrixPart("int8", matrix.shape[0]),) for matrix in matrices}

    counted = native_weight_bytes(list_parameters(config), parts)

    held = sum(tensor.nbytes for linear in parameters.linears.values() for tensor in quantize_weight(linear.weight))
    vectors = sum(tensor.numel() for tensor in parameters.named.values() if tensor.dim() == 1)
    lookup = 0 if config.tie_word_embeddings else parameters.named["embedding"].numel() * 2
    assert counted == held + vectors * FLOAT32_BYTES + lookup


def test_native_bfloat16_takes_two_bytes_for_all_but_vectors() -> None:
    decoder = load_tiny("qwen2")
    vectors = sum(tensor.numel() for tensor in decoder.parameters.named.values() if tensor.dim() == 1)

    counted = native_weight_bytes(list_parameters(decoder.config), {})

    assert counted == 2 * num_parameters(decoder.config) + 2 * vectors

from __future__ import annotations

import pytest
import torch

from brlite.models.quantize import dequantize_weight, quantize_linears_, quantize_weight
from tests.models.steps import load_tiny


@pytest.mark.parametrize("num_inputs", [32, 96, 40, 7])
def test_a_weight_comes_back_within_half_a_level_of_its_group(num_inputs: int) -> None:
    weight = torch.randn(5, num_inputs, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 8.0

    quantized = quantize_weight(weight)

    step = quantized.scales.repeat_interleave(32, dim=1)[:, :num_inputs]
    assert quantized.values.shape == weight.shape
    assert ((dequantize_weight(quantized) - weight).abs() <= step / 2 * 1.0001).all()
    assert (dequantize_weight(quantized)[:, 0] == 8.0).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1.0

    back = dequantize_weight(quantize_weight(weight))

    assert torch.equal(back, weight)


def test_the_pass_quantises_every_linear_and_the_head_but_no_norm_and_no_lookup() -> None:
    decoder = load_tiny("qwen2")
    before = {name: tensor.clone() for name, tensor in decoder.parameters.named.items()}

    quantize_linears_(decoder.parameters)

    changed = {name for name, tensor in decoder.parameters.named.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith(".weight")}


def test_the_pass_is_stable_on_what_it_has_already_rounded() -> None:
    decoder = load_tiny("llama-tied")
    quantize_linears_(decoder.parameters)
    once = decoder.parameters.embedding.clone()

    quantize_linears_(decoder.parameters)

    assert torch.allclose(decoder.parameters.embedding, once, atol=1e-6)

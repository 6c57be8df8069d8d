"""Matrices that stay int8, against the same matrices held dequantized."""

from __future__ import annotations

import pytest
import torch

from brlite.backends.torch import parameters
from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import DeviceRules
from brlite.backends.torch.loading import load_model
from brlite.backends.torch.parameters import GroupedLinear, Linear
from brlite.backends.torch.quantize import dequantize_weight, quantize_weight
from brlite.config.options import ModelSpec
from tests.load_plans import make_plan
from tests.models.steps import DEVICE, LENGTH, Runner, random_ids
from tests.tiny_models import TensorCheckpoint


def make_linear(num_outputs: int, num_inputs: int) -> tuple[GroupedLinear, torch.Tensor]:
    """One that stays int8, with a bias, and the matrix that it stands for."""
    generator = torch.Generator().manual_seed(num_outputs)
    quantized = quantize_weight(torch.randn(num_outputs, num_inputs, generator=generator))
    values = torch.nn.functional.pad(quantized.values, (0, -num_inputs % 32))
    bias = torch.randn(num_outputs, generator=generator)
    return GroupedLinear(values, bias, form="int8", scales=quantized.scales.float()), dequantize_weight(quantized)


def load(name: str, dtype: torch.dtype, *, keeps_int8: bool) -> Decoder:
    spec = ModelSpec(name=name, build_seq=LENGTH, precision="a_bf16_w_int8")
    return load_model(make_plan(TensorCheckpoint.tiny(name), spec), dtype, DEVICE, DeviceRules(keeps_int8=keeps_int8))


@pytest.mark.parametrize("num_inputs", [64, 40, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_dequantized_matrix(num_inputs: int, dtype: torch.dtype) -> None:
    linear, weight = make_linear(5, num_inputs)
    linear = GroupedLinear(linear.weight, linear.bias.to(dtype), form="int8", scales=linear.scales)
    x = torch.randn(3, num_inputs).to(dtype)

    product = linear(x)

    assert product.dtype == dtype
    torch.testing.assert_close(product, Linear(weight.to(dtype), linear.bias)(x))


def test_rows_are_dequantized_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, weight = make_linear(11, 40)
    x = torch.randn(2, 40)

    monkeypatch.setattr(parameters, "MAX_DEQUANTIZED", 200)

    torch.testing.assert_close(linear(x), Linear(weight, linear.bias)(x))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "llama-biases", "chatglm", "baichuan"])
def test_a_model_that_stays_int8_has_the_same_logits(name: str) -> None:
    held, kept = (load(name, torch.float32, keeps_int8=keeps) for keeps in (False, True))
    token_ids, table = random_ids(), range(LENGTH // 4)

    expected, found = (Runner(decoder).whole(token_ids, table) for decoder in (held, kept))

    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert all(isinstance(linear, GroupedLinear) for name, linear in kept.parameters.linears.items() if name != "head")
    assert kept.parameters.num_bytes < held.parameters.num_bytes


def test_a_tied_head_is_quantized_though_it_does_not_stay_int8() -> None:
    held, kept = (load("llama-tied", torch.bfloat16, keeps_int8=keeps) for keeps in (False, True))

    assert torch.equal(kept.parameters.named["embedding"], held.parameters.named["embedding"])
    assert kept.parameters.linears["head"].weight is kept.parameters.named["embedding"]

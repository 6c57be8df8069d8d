"""Packed matrices multiply as plain ones do, and take their place."""

from __future__ import annotations

import pytest
import torch

from brlite.backends.torch.packing import PackedLinear, can_pack, pack_linears
from brlite.backends.torch.parameters import Parameters
from tests.models.steps import load_tiny

NAMES = ("qkv", "o", "gate_up", "down")
DTYPES = [torch.float32, torch.bfloat16]


def parameters(dtype: torch.dtype, name: str = "qwen2") -> Parameters:
    return load_tiny(name, dtype=dtype).parameters


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 64])
def test_a_packed_product_is_the_plain_one_for_any_number_of_rows(dtype: torch.dtype, num_rows: int) -> None:
    plain = parameters(dtype)
    if not can_pack(plain):
        pytest.skip("this processor or this torch has nothing to pack for")
    linears = [plain.linears[f"layers.0.{name}"] for name in NAMES]
    rows = [torch.randn(num_rows, linear.weight.shape[1]).to(dtype) for linear in linears]
    expected = [linear(row) for linear, row in zip(linears, rows, strict=True)]

    packed_linears = pack_linears(plain).linears
    packed = [packed_linears[f"layers.0.{name}"] for name in NAMES]

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for linear, row, product in zip(packed, rows, expected, strict=True):
        assert isinstance(linear, PackedLinear)
        torch.testing.assert_close(linear(row), product, rtol=tolerance, atol=tolerance * float(product.abs().max()))


def test_packing_gives_the_plain_matrices_back_and_counts_the_packed() -> None:
    plain = parameters(torch.float32)
    num_bytes = plain.num_bytes

    packed = pack_linears(plain)

    assert packed.num_bytes == num_bytes
    assert not any(name.endswith(("qkv.weight", "down.weight")) for name in packed.named)
    assert "layers.0.qkv.bias" in packed.named

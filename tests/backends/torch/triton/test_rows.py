"""The residual stream: what is added to it, and its norm, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from brlite.backends.torch.triton.rows import add_norm_kernel
from tests.backends.torch.triton.interpreter import BFLOAT16_STEP

EPSILON = 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize(("num_parts", "has_bias"), [(0, False), (1, True), (3, False), (3, True)])
def test_parts_and_bias_are_added_and_the_norm_taken(
    num_parts: int, has_bias: bool, has_norm: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(num_parts)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((3, 70), (70,)))
    product = torch.randn((num_parts, 3, 70), generator=generator)
    bias = torch.randn(70, generator=generator).bfloat16() if has_bias else None
    out = torch.zeros_like(hidden, dtype=dtype)
    expected = hidden.double() + product.double().sum(dim=0) + (0 if bias is None else bias.double())

    add_norm_kernel[(3,)](
        *(hidden, product, bias, weight if has_norm else None, out, 3, 70, EPSILON),
        NUM_PARTS=num_parts,
        HAS_BIAS=has_bias,
        HAS_NORM=has_norm,
        BLOCK=128,
    )

    torch.testing.assert_close(hidden.double(), expected, rtol=1e-6, atol=1e-6)
    normed = expected / (expected.square().mean(dim=1, keepdim=True) + EPSILON).sqrt() * weight
    rtol = BFLOAT16_STEP if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), normed if has_norm else torch.zeros_like(normed), rtol=rtol, atol=1e-5)

"""Adds a product to the rows of the residual stream, and computes their norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=("num_rows",))
def add_norm_kernel(
    hidden,
    product,
    bias,
    weight,
    out,
    num_rows,
    size,
    epsilon,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden [M, H] float32 += the sum of product [parts, M, H], and bias; out [M, H] = its RMS norm times weight.

    With no parts nothing is added; without `HAS_NORM` `out` is not written.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_there = columns < size
    values = tl.load(hidden + row * size + columns, mask=is_there, other=0)
    if NUM_PARTS > 0:
        total = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(NUM_PARTS):
            total += tl.load(product + (part * num_rows + row) * size + columns, mask=is_there, other=0)
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=is_there, other=0).to(tl.float32)
        values += total
        tl.store(hidden + row * size + columns, values, mask=is_there)
    if HAS_NORM:
        mean = tl.sum(values * values, axis=0) / size
        factors = tl.load(weight + columns, mask=is_there, other=0)
        result = values * (1 / tl.sqrt(mean + epsilon)) * factors
        tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=("num_rows",))
def take_draws_kernel(token_ids, sources, drawn, num_rows, BLOCK: tl.constexpr):
    """token_ids [T] int32 = drawn [R] int64 at `sources` [T], where these are not negative; 0 for a draw of -1."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + rows, mask=rows < num_rows, other=-1)
    tokens = tl.load(drawn + source, mask=source >= 0, other=0)
    tl.store(token_ids + rows, tl.maximum(tokens, 0).to(tl.int32), mask=source >= 0)


def take_draws(token_ids: Tensor, sources: Tensor, drawn: Tensor) -> None:
    """Replace the tokens that were not known yet by the draws of the previous step."""
    take_draws_kernel[(triton.cdiv(len(token_ids), 256),)](token_ids, sources, drawn, len(token_ids), BLOCK=256)


def try_kernel(device: torch.device) -> None:
    """Compile and run a kernel. Raises Triton's errors if there is no compiler or driver."""
    hidden, weight = (torch.ones((1, 16), device=device) for _ in range(2))
    add_norm_kernel[(1,)](
        *(hidden, None, None, weight, torch.empty_like(hidden), 1, 16, 0.0),
        NUM_PARTS=0,
        HAS_BIAS=False,
        HAS_NORM=True,
        BLOCK=16,
    )

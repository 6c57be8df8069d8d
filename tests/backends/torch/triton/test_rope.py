"""Heads after their product: normed, turned and stored, against the same by torch in float32."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from brlite.backends.torch import kv_cache
from brlite.backends.torch.rope import RopeTables, rope_tables, rotate_
from brlite.backends.torch.triton.rope import store_heads_kernel
from brlite.models.config import RopeConfig
from tests.backends.torch.triton.interpreter import BFLOAT16_STEP

NUM_HEADS = 3
NUM_KV_HEADS = 2
ALL_HEADS = NUM_HEADS + 2 * NUM_KV_HEADS
BLOCK_SIZE = 4
NUM_BLOCKS = 5
POSITIONS = [0, 7, 19]
SLOTS = [17, 2, 9]  # scattered
EPSILON = 1e-5


class Heads(NamedTuple):
    """How the heads of a model are made."""

    head_dim: int
    rotary_dim: int
    interleaved: bool = False
    has_bias: bool = False
    has_norm: bool = False
    num_parts: int = 1


CASES = {
    "plain": Heads(16, 16),
    "parts and bias": Heads(16, 16, has_bias=True, num_parts=3),
    "norm": Heads(16, 16, has_norm=True, num_parts=2),
    "norm and bias, interleaved": Heads(24, 24, interleaved=True, has_bias=True, has_norm=True),
    "partial": Heads(24, 18),
    "partial, norm": Heads(24, 12, has_norm=True),
    "partial, interleaved": Heads(80, 40, interleaved=True),
    "no turn": Heads(24, 0, has_bias=True, has_norm=True),
}


class Stored(NamedTuple):
    """Queries [T, Hq, D], and keys and values [slots, Hk, D], in float32."""

    query: Tensor
    keys: Tensor
    values: Tensor


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected_heads(qkv: Tensor, heads: Heads) -> Stored:
    """What is to be stored for each row of qkv [T, heads, D], biases and all, in float32: three times [T, …, D]."""
    query, key, value = qkv.split_with_sizes((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
    if heads.has_norm:
        scales = [(part.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt() for part in (query, key)]
        query, key = query * scales[0] * norm_weight(heads, 0), key * scales[1] * norm_weight(heads, 1)
    turned = torch.cat((query, key), dim=1)
    if heads.rotary_dim:
        rotate_(turned, tables_of(heads).at(torch.tensor(POSITIONS)))
    return Stored(turned[:, :NUM_HEADS], turned[:, NUM_HEADS:], value)


def tables_of(heads: Heads) -> RopeTables:
    rope = RopeConfig(rotary_dim=heads.rotary_dim or 2, interleaved=heads.interleaved)
    return rope_tables(rope, max(POSITIONS) + 1, torch.device("cpu"))


def norm_weight(heads: Heads, seed: int) -> Tensor:
    return 1 + random(heads.head_dim, seed=seed) / 10


def store(qkv: Tensor, bias: Tensor | None, heads: Heads, pages: list[Tensor], scales: list[Tensor] | None) -> Tensor:
    """Run the kernel on qkv [parts, T, heads · D]; returns the queries."""
    tables = tables_of(heads)
    query = torch.empty((len(POSITIONS), NUM_HEADS, heads.head_dim), dtype=torch.bfloat16)
    norms = [norm_weight(heads, seed) for seed in (0, 1)] if heads.has_norm else [None, None]
    store_heads_kernel[(len(POSITIONS), ALL_HEADS)](
        *(qkv, bias, *norms, tables.cos, tables.sin),
        *(torch.tensor(POSITIONS, dtype=torch.int32), torch.tensor(SLOTS, dtype=torch.int32)),
        *(query, *pages, *(scales or (None, None)), len(POSITIONS), EPSILON),
        NUM_PARTS=len(qkv),
        NUM_HEADS=NUM_HEADS,
        NUM_KV_HEADS=NUM_KV_HEADS,
        HEAD_DIM=heads.head_dim,
        ROTARY_DIM=heads.rotary_dim,
        IS_INTERLEAVED=heads.interleaved,
        HAS_BIAS=bias is not None,
        HAS_NORM=heads.has_norm,
        IS_INT8=scales is not None,
        BLOCK_DIM=1 << (heads.head_dim - 1).bit_length(),
    )
    return query


def make_input(heads: Heads) -> tuple[Tensor, Tensor | None, Tensor]:
    """The product's parts, the bias, and both added up."""
    qkv = random(heads.num_parts, len(POSITIONS), ALL_HEADS * heads.head_dim, seed=2)
    bias = random(ALL_HEADS * heads.head_dim, seed=3).bfloat16() if heads.has_bias else None
    total = qkv.sum(dim=0) + (0 if bias is None else bias.float())
    return qkv, bias, total.view(len(POSITIONS), ALL_HEADS, heads.head_dim)


@pytest.mark.parametrize("heads", CASES.values(), ids=CASES)
def test_heads_are_those_of_torch_and_lie_in_their_slots(heads: Heads) -> None:
    qkv, bias, total = make_input(heads)
    pages = [torch.full((NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, heads.head_dim), 5.0).bfloat16() for _ in range(2)]
    expected = expected_heads(total, heads)

    query = store(qkv, bias, heads, pages, None)

    torch.testing.assert_close(query.float(), expected.query, rtol=BFLOAT16_STEP, atol=1e-6)
    for page, rows in zip(pages, expected[1:], strict=True):
        slots = page.flatten(0, 1)
        torch.testing.assert_close(slots[SLOTS].float(), rows, rtol=BFLOAT16_STEP, atol=1e-6)
        others = [slot for slot in range(NUM_BLOCKS * BLOCK_SIZE) if slot not in SLOTS]
        assert (slots[others] == 5).all()


@pytest.mark.parametrize("heads", [CASES["parts and bias"], CASES["partial, norm"]], ids=["halves", "norm"])
def test_int8_heads_have_the_levels_and_scales_of_the_cache_in_torch(heads: Heads) -> None:
    qkv, bias, total = make_input(heads)
    total[1, -1] = 0  # a head of zeros
    qkv[:, 1, -heads.head_dim :] = 0
    if bias is not None:
        bias[-heads.head_dim :] = 0
        total[:, -1] = qkv[:, :, -heads.head_dim :].sum(dim=0)
    shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, heads.head_dim)
    pages, scales = make_int8_pages(shape)
    expected_pages = [kv_cache.Pages(*tensors) for tensors in zip(*make_int8_pages(shape), strict=True)]
    for page, rows in zip(expected_pages, expected_heads(total, heads)[1:], strict=True):
        page.write(torch.tensor(SLOTS), rows)

    store(qkv, bias, heads, pages, scales)

    for levels, scale, expected in zip(pages, scales, expected_pages, strict=True):
        torch.testing.assert_close(scale, expected.scales, rtol=1e-5, atol=0)
        differences = (levels.int() - expected.values.int()).abs()
        assert differences.max() <= 1  # a half may be rounded the other way
        assert differences.float().mean() < 0.01
    assert scales[1].flatten(0, 1)[SLOTS[1], -1] == 0


@pytest.mark.parametrize("where", [slice(-1, None), slice(-24, None)], ids=["one number", "all of the head"])
def test_a_nan_is_carried_by_the_scale_of_its_head_alone(where: slice) -> None:
    heads = Heads(24, 24)
    qkv, _, _ = make_input(heads)
    qkv[0, 0, where] = torch.nan  # in the last value head of the first row
    pages, scales = make_int8_pages((NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, heads.head_dim))

    store(qkv, None, heads, pages, scales)

    is_nan = scales[1].isnan().flatten(0, 1)[..., 0]
    assert is_nan.nonzero().tolist() == [[SLOTS[0], NUM_KV_HEADS - 1]]
    assert not scales[0].isnan().any()


def make_int8_pages(shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of zeros, and their scales."""
    pages = [torch.zeros(shape, dtype=torch.int8) for _ in range(2)]
    return pages, [torch.zeros((*shape[:-1], 1)) for _ in range(2)]

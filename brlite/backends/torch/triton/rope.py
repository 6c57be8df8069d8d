"""Normalises and rotates the heads of queries and keys after their product, and stores keys and values in the cache.

One program for each row and head. It reads a head twice, in order and with its rotary pairs swapped.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12_582_912.0)  # 1.5 · 2^23: a float32 added to it is rounded to the nearest integer, ties to even


@triton.jit
def _head(
    qkv,
    bias,
    row,
    columns,
    is_there,
    num_rows,
    SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The values in `columns` of a row of qkv [parts, T, SIZE], summed over the parts."""
    total = tl.zeros(columns.shape, tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += tl.load(qkv + (part * num_rows + row) * SIZE + columns, mask=is_there, other=0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=is_there, other=0).to(tl.float32)
    return total


@triton.jit
def _pairs_of(dims, ROTARY_DIM: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """The dimension with which each is rotated."""
    if IS_INTERLEAVED:
        pairs = dims ^ 1
    else:
        pairs = tl.where(dims < ROTARY_DIM // 2, dims + ROTARY_DIM // 2, dims - ROTARY_DIM // 2)
    return pairs


@triton.jit
def _rotated(heads, swapped, cos, sin, position, dims, ROTARY_DIM: tl.constexpr):
    """A head at `position`; `swapped` has it with the values of its rotary pairs exchanged."""
    is_turned = dims < ROTARY_DIM
    angles = position.to(tl.int64) * ROTARY_DIM + dims
    turned = heads * tl.load(cos + angles, mask=is_turned, other=0)
    turned += swapped * tl.load(sin + angles, mask=is_turned, other=0)
    return tl.where(is_turned, turned, heads)


@triton.jit
def _store(pages, scales, place, heads, dims, is_there, HEAD_DIM: tl.constexpr, IS_INT8: tl.constexpr):
    """Write a key or value head to its place in the cache, in int8 with one scale for the head."""
    if IS_INT8:
        is_nan = tl.max((heads != heads).to(tl.int32), axis=0) > 0  # the maximum of floats ignores NaN
        scale = tl.where(is_nan, float("nan"), tl.max(tl.abs(heads), axis=0) / 127)
        levels = heads / tl.maximum(scale, 1.1754944e-38) + _ROUND - _ROUND
        levels = tl.minimum(tl.maximum(levels, -127.0), 127.0)
        levels = tl.where(levels == levels, levels, 0.0)  # int8 cannot hold a NaN: its head's scale is NaN
        tl.store(pages + place * HEAD_DIM + dims, levels.to(tl.int8), mask=is_there)
        tl.store(scales + place, scale)
    else:
        tl.store(pages + place * HEAD_DIM + dims, heads.to(tl.bfloat16), mask=is_there)


@triton.jit(do_not_specialize=("num_rows",))
def store_heads_kernel(
    qkv,
    bias,
    query_norm,
    key_norm,
    cos,
    sin,
    positions,
    slots,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    num_rows,
    epsilon,
    NUM_PARTS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """query [T, Hq, D] bfloat16, and the cache of a layer at `slots` [T], from qkv [parts, T, (Hq + 2 Hk) D] float32.

    cos and sin [positions, ROTARY_DIM] come from `rope_tables`; with a ROTARY_DIM of 0 no head is rotated.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_DIM)
    is_there = dims < HEAD_DIM
    SIZE: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    heads = _head(qkv, bias, row, head * HEAD_DIM + dims, is_there, num_rows, SIZE, NUM_PARTS, HAS_BIAS)
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    if not is_value:
        scale = 1.0
        if HAS_NORM:
            weight = query_norm
            if head >= NUM_HEADS:
                weight = key_norm
            scale = 1 / tl.sqrt(tl.sum(heads * heads, axis=0) / HEAD_DIM + epsilon)
            heads = heads * scale * tl.load(weight + dims, mask=is_there, other=0)
        if ROTARY_DIM > 0:
            is_turned = dims < ROTARY_DIM
            pairs = _pairs_of(dims, ROTARY_DIM, IS_INTERLEAVED)
            swapped = _head(qkv, bias, row, head * HEAD_DIM + pairs, is_turned, num_rows, SIZE, NUM_PARTS, HAS_BIAS)
            if HAS_NORM:
                swapped = swapped * scale * tl.load(weight + pairs, mask=is_turned, other=0)
            heads = _rotated(heads, swapped, cos, sin, tl.load(positions + row), dims, ROTARY_DIM)
    if head < NUM_HEADS:
        tl.store(query + (row * NUM_HEADS + head) * HEAD_DIM + dims, heads.to(tl.bfloat16), mask=is_there)
    else:
        place = tl.load(slots + row).to(tl.int64) * NUM_KV_HEADS + head - NUM_HEADS
        if is_value:
            _store(values, value_scales, place - NUM_KV_HEADS, heads, dims, is_there, HEAD_DIM, IS_INT8)
        else:
            _store(keys, key_scales, place, heads, dims, is_there, HEAD_DIM, IS_INT8)

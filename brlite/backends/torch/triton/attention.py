"""Attention over the paged cache, for prompt chunks and single tokens alike, with bits that do not depend on the batch.

A row's keys are read in splits of SPLIT positions, counted from position 0 of its sequence, and within a split in
tiles of BLOCK_KEYS, with an online softmax (Milakov and Gimelshein, arXiv 1805.02867). The results of the splits are
merged in order. For single tokens one program computes a tile of rows over one split, and `merge_kernel` merges, so
that a long context uses the whole card. For chunks one program computes all splits of a tile and merges them itself.
Masked keys have a weight of exactly zero, so a row's result does not depend on the other rows of its tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from brlite.backends.torch.triton.inputs import StepInputs
from brlite.backends.torch.triton.precision import DOT, widen

MIN_SPLIT = 256
MAX_SPLITS = 64
BLOCK_KEYS = 64


class HeadsShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int


class LayerPages(NamedTuple):
    """A layer's cache [blocks, block_size, Hk, D], with scales [blocks, block_size, Hk, 1] if it is int8."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


def split_size(max_length: int) -> int:
    """The positions of a split, for a model of contexts up to `max_length`."""
    return max(MIN_SPLIT, int(triton.next_power_of_2(-(-max_length // MAX_SPLITS))))


def tile_tokens(group_size: int) -> int:
    """How many tokens of a prompt chunk share a tile."""
    return max(128, int(triton.next_power_of_2(group_size))) // group_size


@triton.jit
def _corrections(best, other_best):
    """The larger of two softmax maxima, and the factors that rescale both sums to it."""
    new_best = tl.maximum(best, other_best)
    reference = tl.where(new_best == float("-inf"), 0.0, new_best)
    return new_best, tl.exp2(best - reference), tl.exp2(other_best - reference)


@triton.jit
def attention_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    tile_seqs,
    tile_firsts,
    starts,
    lengths,
    first_rows,
    out,
    part_best,
    part_weight,
    table_width,
    num_singles,
    softmax_scale,
    WINDOW: tl.constexpr,
    IS_PART: tl.constexpr,
    IS_INT8: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [T, Hq, D] bfloat16; or with `IS_PART`, for S single tokens, a split of it: out [splits, S, Hq, D] and part_*
    [splits, S, Hq] in float32.

    Program (tile, key head, split). A tile is BLOCK_ROWS rows, the query heads of one key head side by side, of
    sequence `tile_seqs`, from token `tile_firsts` of its span on. The span of a sequence has `lengths` tokens, which
    begin at position `starts` and at row `first_rows` of the step.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    seq = tl.load(tile_seqs + tile)
    tokens = tl.load(tile_firsts + tile) + tl.arange(0, BLOCK_ROWS) // GROUP
    length = tl.load(lengths + seq)
    start = tl.load(starts + seq)
    rows = (tl.load(first_rows + seq) + tokens).to(tl.int64)
    is_row = (tokens < length) & (tl.arange(0, BLOCK_ROWS) < BLOCK_ROWS // GROUP * GROUP)
    heads = kv_head * GROUP + tl.arange(0, BLOCK_ROWS) % GROUP
    positions = start + tokens
    end = tl.minimum(start + length, tl.max(positions, axis=0) + 1)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, tl.min(positions, axis=0) - WINDOW + 1)
    first_split = begin // SPLIT
    last_split = tl.cdiv(end, SPLIT)
    if IS_PART:
        split = tl.program_id(2)
        if (split < first_split) | (split >= last_split):
            return
        first_split = split
        last_split = split + 1

    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    q = tl.load(
        query + (rows * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0,
    ).to(DOT)
    scale = softmax_scale * 1.4426950408889634
    total_best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total_weight = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for split in range(first_split, last_split):
        best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_ROWS], tl.float32)
        values_sum = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        first = tl.maximum(split * SPLIT, begin // BLOCK_KEYS * BLOCK_KEYS)
        last = tl.minimum((split + 1) * SPLIT, end)
        for first_key in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
            key_positions = first_key + tl.arange(0, BLOCK_KEYS)
            is_key = key_positions < end
            blocks = tl.load(tables + seq * table_width + key_positions // BLOCK_SIZE, mask=is_key, other=0)
            slots = (blocks.to(tl.int64) * BLOCK_SIZE + key_positions % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
            pages = slots[:, None] * HEAD_DIM + dims[None, :]
            is_value = is_key[:, None] & is_dim[None, :]
            k = tl.load(keys + pages, mask=is_value, other=0)
            scores = tl.dot(q, tl.trans(widen(k) if IS_INT8 else k.to(DOT))) * scale
            if IS_INT8:
                scores *= tl.load(key_scales + slots, mask=is_key, other=0)[None, :]
            is_seen = key_positions[None, :] <= positions[:, None]
            if WINDOW > 0:
                is_seen &= key_positions[None, :] > positions[:, None] - WINDOW
            scores = tl.where(is_seen, scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            reference = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.exp2(scores - reference[:, None])
            correction = tl.exp2(best - reference)
            weight = weight * correction + tl.sum(weights, axis=1)
            v = tl.load(values + pages, mask=is_value, other=0)
            if IS_INT8:
                weights *= tl.load(value_scales + slots, mask=is_key, other=0)[None, :]
            values_sum = tl.dot(
                weights.to(tl.bfloat16).to(DOT), widen(v) if IS_INT8 else v.to(DOT), values_sum * correction[:, None]
            )
            best = new_best
        if IS_PART:
            total_best = best
            total_weight = weight
            total = values_sum
        else:
            total_best, correction, new_correction = _corrections(total_best, best)
            total_weight = total_weight * correction + weight * new_correction
            total = total * correction[:, None] + values_sum * new_correction[:, None]
    places = rows * NUM_HEADS + heads
    if IS_PART:
        places += tl.program_id(2).to(tl.int64) * num_singles * NUM_HEADS
        tl.store(part_best + places, total_best, mask=is_row)
        tl.store(part_weight + places, total_weight, mask=is_row)
        result = total
    else:
        result = (total / total_weight[:, None]).to(tl.bfloat16)
    tl.store(out + places[:, None] * HEAD_DIM + dims[None, :], result, mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def merge_kernel(
    parts,
    part_best,
    part_weight,
    out,
    positions,
    num_singles,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out [T, Hq, D] bfloat16 of the splits that `attention_kernel` wrote. Program (row, head)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    position = tl.load(positions + row)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, position - WINDOW + 1)
    total_best = tl.full([1], float("-inf"), tl.float32)
    total_weight = tl.zeros([1], tl.float32)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    for split in range(begin // SPLIT, position // SPLIT + 1):
        place = (split * num_singles + row).to(tl.int64) * NUM_HEADS + head
        best = tl.load(part_best + place + tl.zeros([1], tl.int32))
        weight = tl.load(part_weight + place + tl.zeros([1], tl.int32))
        values_sum = tl.load(parts + place * HEAD_DIM + dims, mask=is_dim, other=0)
        total_best, correction, new_correction = _corrections(total_best, best)
        total_weight = total_weight * correction + weight * new_correction
        total = total * correction + values_sum * new_correction
    place = (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    tl.store(out + place + dims, (total / total_weight).to(tl.bfloat16), mask=is_dim)


def attend(
    query: Tensor, pages: LayerPages, inputs: StepInputs, heads: HeadsShape, *, window: int, split: int
) -> Tensor:
    """Attention of every row of query [T, Hq, D] to its sequence's cache, its own key included: [T, Hq · D]."""
    num_rows, num_singles = inputs.num_rows, inputs.num_singles
    group = heads.num_heads // heads.num_kv_heads
    out = torch.empty_like(query)
    shape = {
        "WINDOW": window,
        "NUM_HEADS": heads.num_heads,
        "HEAD_DIM": heads.head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(heads.head_dim)),
        "SPLIT": split,
    }
    scale = 1 / math.sqrt(heads.head_dim)

    def launch(tiles: tuple[Tensor, Tensor], depth: int, target: tuple[Tensor | None, ...], **options: int) -> None:
        attention_kernel[(len(tiles[0]), heads.num_kv_heads, depth)](
            *(query, *pages, inputs.tables, *tiles, inputs.starts, inputs.lengths, inputs.first_rows, *target),
            *(inputs.tables.shape[1], num_singles, scale),
            **shape,
            **options,
            IS_INT8=pages.key_scales is not None,
            NUM_KV_HEADS=heads.num_kv_heads,
            BLOCK_SIZE=pages.keys.shape[1],
            BLOCK_KEYS=BLOCK_KEYS,
            enable_fp_fusion=False,
        )

    if num_singles:
        splits = inputs.num_splits(split)
        parts = query.new_empty((splits, num_singles, heads.num_heads, heads.head_dim), dtype=torch.float32)
        sums = query.new_empty((2, splits, num_singles, heads.num_heads), dtype=torch.float32)
        rows = max(16, triton.next_power_of_2(group))
        launch(inputs.single_tiles, splits, (parts, *sums), IS_PART=True, BLOCK_ROWS=rows, STAGES=2, num_warps=4)
        merge_kernel[(num_singles, heads.num_heads)](
            parts, *sums, out, inputs.positions, num_singles, **shape, num_warps=1, enable_fp_fusion=False
        )
    if inputs.num_tiles:
        rows = max(128, triton.next_power_of_2(group))
        launch(inputs.tiles, 1, (out, None, None), IS_PART=False, BLOCK_ROWS=rows, STAGES=2, num_warps=8)
    return out.view(num_rows, -1)

"""Attention over the paged cache, for prompt chunks and single tokens alike, with bits that do not depend on the batch.

A row's keys are read in splits of SPLIT positions, counted from position 0 of its sequence, and within a split in
tiles of BLOCK_KEYS (32 or 64, by head and card), with an online softmax (Milakov and Gimelshein, arXiv 1805.02867). The
results of the splits are merged in order. For single tokens one program computes a tile of rows over one split, and
`merge_kernel` merges, so that a long context uses the whole card. For chunks one program computes all splits of a tile
and merges them itself.
Masked keys have a weight of exactly zero, so a row's result does not depend on the other rows of its tile. Positions
that no row of a tile sees are not loaded: zero times a value that is not finite would be NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from brlite.backends.torch.graph_memory import MIN_SPLIT, split_size
from brlite.backends.torch.triton.inputs import StepInputs
from brlite.backends.torch.triton.precision import DOT, widen
from brlite.models.config import ModelConfig

LARGE_HEAD_SHARED = 147_456  # bytes that a tile of 128 rows and 64 keys of heads above 128 takes at the least


class AttentionShape(NamedTuple):
    """The heads of a model, the positions of a split, and the keys of a tile with the tiles that are loaded at once."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    split: int = MIN_SPLIT
    keys: int = 64
    stages: int = 2

    @classmethod
    def of(cls, config: ModelConfig, max_length: int, shared_memory: int) -> AttentionShape:
        """The shape for contexts up to `max_length`, on a card whose programs may have `shared_memory` bytes."""
        is_small = config.head_dim > 128 and shared_memory < LARGE_HEAD_SHARED
        tile = (32, 1) if is_small else (64, 2)
        return cls(config.num_heads, config.num_kv_heads, config.head_dim, split_size(max_length), *tile)

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


class LayerPages(NamedTuple):
    """A layer's cache [blocks, block_size, Hk, D], with scales [blocks, block_size, Hk, 1] if it is int8."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


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
def _first_seen(position, WINDOW: tl.constexpr):
    """The first position that a row at `position` sees."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, position - WINDOW + 1)
    return begin


@triton.jit
def _tile_rows(first_token, length, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Of each row of a tile the token of the span, the number in the group of query heads, and whether there is one."""
    rows = tl.arange(0, BLOCK_ROWS)
    tokens = first_token + rows // GROUP
    return tokens, rows % GROUP, (tokens < length) & (rows < BLOCK_ROWS // GROUP * GROUP)


@triton.jit
def _keys_seen(first_key, positions, WINDOW: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Which of BLOCK_KEYS keys from position `first_key` on each row sees: [BLOCK_ROWS, BLOCK_KEYS]."""
    key_positions = first_key + tl.arange(0, BLOCK_KEYS)
    is_seen = key_positions[None, :] <= positions[:, None]
    if WINDOW > 0:
        is_seen &= key_positions[None, :] > positions[:, None] - WINDOW
    return is_seen


@triton.jit
def _attend_split(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    kv_head,
    positions,
    split,
    begin,
    end,
    scale,
    WINDOW: tl.constexpr,
    IS_INT8: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of q [BLOCK_ROWS, BLOCK_DIM] to the keys of a split that a tile sees, of those from `begin` to `end`.

    Returns the largest scaled score of each row, the sum of the softmax weights relative to it, and that of the values.
    """
    dims = tl.arange(0, q.shape[1])
    best = tl.full([q.shape[0]], float("-inf"), tl.float32)
    weight = tl.zeros([q.shape[0]], tl.float32)
    values_sum = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    first = tl.maximum(split * SPLIT, begin // BLOCK_KEYS * BLOCK_KEYS)
    last = tl.minimum((split + 1) * SPLIT, end)
    for first_key in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
        key_positions = first_key + tl.arange(0, BLOCK_KEYS)
        is_key = key_positions < end
        if WINDOW > 0:
            is_key &= key_positions >= begin
        blocks = tl.load(table + key_positions // BLOCK_SIZE, mask=is_key, other=0)
        slots = (blocks.to(tl.int64) * BLOCK_SIZE + key_positions % BLOCK_SIZE) * NUM_KV_HEADS + kv_head
        pages = slots[:, None] * HEAD_DIM + dims[None, :]
        is_value = is_key[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + pages, mask=is_value, other=0)
        scores = tl.dot(q, tl.trans(widen(k) if IS_INT8 else k.to(DOT))) * scale
        if IS_INT8:
            scores *= tl.load(key_scales + slots, mask=is_key, other=0)[None, :]
        scores = tl.where(_keys_seen(first_key, positions, WINDOW, BLOCK_KEYS), scores, float("-inf"))
        new_best, correction, _ = _corrections(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - tl.where(new_best == float("-inf"), 0.0, new_best)[:, None])
        weight = weight * correction + tl.sum(weights, axis=1)
        v = tl.load(values + pages, mask=is_value, other=0)
        if IS_INT8:
            weights *= tl.load(value_scales + slots, mask=is_key, other=0)[None, :]
        values_sum = tl.dot(
            weights.to(tl.bfloat16).to(DOT), widen(v) if IS_INT8 else v.to(DOT), values_sum * correction[:, None]
        )
        best = new_best
    return best, weight, values_sum


@triton.jit(do_not_specialize=("table_width", "num_singles"))
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
    length = tl.load(lengths + seq)
    start = tl.load(starts + seq)
    tokens, head_numbers, is_row = _tile_rows(tl.load(tile_firsts + tile), length, GROUP, BLOCK_ROWS)
    positions = start + tokens
    begin = _first_seen(tl.min(positions, axis=0), WINDOW)
    end = tl.minimum(start + length, tl.max(positions, axis=0) + 1)
    first_split = begin // SPLIT
    last_split = tl.cdiv(end, SPLIT)
    if IS_PART:
        split = tl.program_id(2)
        if (split < first_split) | (split >= last_split):
            return
        first_split = split
        last_split = split + 1

    dims = tl.arange(0, BLOCK_DIM)
    is_place = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    places = (tl.load(first_rows + seq) + tokens).to(tl.int64) * NUM_HEADS + kv_head * GROUP + head_numbers
    q = tl.load(query + places[:, None] * HEAD_DIM + dims[None, :], mask=is_place, other=0).to(DOT)
    total_best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total_weight = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for split in range(first_split, last_split):
        best, weight, values_sum = _attend_split(
            q, keys, values, key_scales, value_scales, tables + seq * table_width, kv_head, positions,
            split, begin, end, softmax_scale * 1.4426950408889634,
            WINDOW, IS_INT8, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_KEYS, SPLIT, STAGES,
        )  # fmt: skip
        if IS_PART:
            total_best = best
            total_weight = weight
            total = values_sum
        else:
            total_best, correction, new_correction = _corrections(total_best, best)
            total_weight = total_weight * correction + weight * new_correction
            total = total * correction[:, None] + values_sum * new_correction[:, None]
    if IS_PART:
        places += tl.program_id(2).to(tl.int64) * num_singles * NUM_HEADS
        tl.store(part_best + places, total_best, mask=is_row)
        tl.store(part_weight + places, total_weight, mask=is_row)
        result = total
    else:
        result = (total / total_weight[:, None]).to(tl.bfloat16)
    tl.store(out + places[:, None] * HEAD_DIM + dims[None, :], result, mask=is_place)


@triton.jit(do_not_specialize=("num_singles",))
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
    total_best = tl.full([1], float("-inf"), tl.float32)
    total_weight = tl.zeros([1], tl.float32)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    for split in range(_first_seen(position, WINDOW) // SPLIT, position // SPLIT + 1):
        place = (split * num_singles + row).to(tl.int64) * NUM_HEADS + head
        best = tl.load(part_best + place + tl.zeros([1], tl.int32))
        weight = tl.load(part_weight + place + tl.zeros([1], tl.int32))
        values_sum = tl.load(parts + place * HEAD_DIM + dims, mask=is_dim, other=0)
        total_best, correction, new_correction = _corrections(total_best, best)
        total_weight = total_weight * correction + weight * new_correction
        total = total * correction + values_sum * new_correction
    place = (row.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    tl.store(out + place + dims, (total / total_weight).to(tl.bfloat16), mask=is_dim)


def attend(query: Tensor, pages: LayerPages, inputs: StepInputs, shape: AttentionShape, *, window: int) -> Tensor:
    """Attention of every row of query [T, Hq, D] to its sequence's cache, its own key included: [T, Hq · D]."""
    num_rows, num_singles = inputs.num_rows, inputs.num_singles
    group = triton.next_power_of_2(shape.group_size)
    out = torch.empty_like(query)
    constants = {
        "WINDOW": window,
        "NUM_HEADS": shape.num_heads,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(shape.head_dim)),
        "SPLIT": shape.split,
        "enable_fp_fusion": False,
    }

    def launch(tiles: tuple[Tensor, Tensor], depth: int, target: tuple[Tensor | None, ...], **options: int) -> None:
        attention_kernel[(len(tiles[0]), shape.num_kv_heads, depth)](
            *(query, *pages, inputs.tables, *tiles, inputs.starts, inputs.lengths, inputs.first_rows, *target),
            *(inputs.tables.shape[1], num_singles, 1 / math.sqrt(shape.head_dim)),
            **constants,
            **options,
            IS_INT8=pages.key_scales is not None,
            NUM_KV_HEADS=shape.num_kv_heads,
            BLOCK_SIZE=pages.keys.shape[1],
            BLOCK_KEYS=shape.keys,
            STAGES=shape.stages,
        )

    if num_singles:
        splits = inputs.num_splits(shape.split)
        sizes = (splits, num_singles, shape.num_heads)
        parts = query.new_empty((*sizes, shape.head_dim), dtype=torch.float32)
        best, weight = (query.new_empty(sizes, dtype=torch.float32) for _ in range(2))
        launch(inputs.single_tiles, splits, (parts, best, weight), IS_PART=True, BLOCK_ROWS=max(16, group), num_warps=4)
        merge_kernel[(num_singles, shape.num_heads)](
            parts, best, weight, out, inputs.positions, num_singles, **constants, num_warps=1
        )
    if inputs.num_tiles:
        launch(inputs.tiles, 1, (out, None, None), IS_PART=False, BLOCK_ROWS=max(128, group), num_warps=8)
    return out.view(num_rows, -1)

"""Attention over the paged cache. A step's plan (index tensors and masks) is made once and used by every layer.

Prefill and decode are the same: a decode is a span of one token. Spans of similar shape form a group and attend in one
call. Some devices compile each new shape. For them the rows of a step, and the spans, tokens and blocks of a group, are
padded to powers of two. Padding is written to a scratch block, and its results are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from brlite.backends.torch.device import send
from brlite.backends.torch.kv_cache import KVCache, LayerCache
from brlite.models.config import ModelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """A run of one sequence's positions, `start` to `start + length - 1`, cached in the blocks of `block_table`."""

    start: int
    length: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.length


NO_SPAN = Span(0, 0, ())  # pads a group; it reads null blocks


@dataclass(frozen=True)
class KeyView:
    """The blocks [B · N] that a group's B spans read, and the mask [B, 1, length · G, N · block_size] to add.

    G query heads share a key head; they are folded into the query length, so the mask has G equal rows for each query.
    """

    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True)
class SpanGroup:
    """`num_spans` spans of `length` tokens each: `rows` of the step, with one `KeyView` per window."""

    num_spans: int
    length: int
    rows: slice | Tensor
    views: dict[int | None, KeyView]

    def take(self, query: Tensor) -> Tensor:
        """The group's rows of `query` [T, Hq, D]."""
        return query[self.rows] if isinstance(self.rows, slice) else query.index_select(0, self.rows)


@dataclass(frozen=True)
class StepPlan:
    """A step's tokens in the order they are computed: span after span, group after group, then the padding.

    `first_rows` is the first row of each span, in the order they were given. `begun_blocks` are those whose first slot
    is written in this step; they are cleared before. `places` [T] is the index of each row among the padded groups'.
    """

    first_rows: list[int]
    positions: Tensor
    slots: Tensor
    begun_blocks: Tensor
    groups: list[SpanGroup]
    places: Tensor | None = None

    def in_rows(self, token_ids: Sequence[Sequence[int]]) -> list[int]:
        """The tokens of all spans, given in the spans' order, in the order of the step's rows."""
        rows = [0] * len(self.positions)
        for first, ids in zip(self.first_rows, token_ids, strict=True):
            rows[first : first + len(ids)] = ids
        return rows


class StepPlanner:
    """Makes the plans of steps for one decoder and one cache. With `has_few_shapes` they are padded to few shapes."""

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_few_shapes: bool = False,
    ) -> None:
        self._windows = sorted({config.window(layer) for layer in range(config.num_layers)}, key=lambda w: w or 0)
        self._group_size = config.group_size
        self._block_size = cache.block_size
        self._null_block = cache.null_block
        self._scratch_block = cache.scratch_block
        self._has_few_shapes = has_few_shapes
        self._dtype = dtype
        self._device = device

    def plan(self, spans: Sequence[Span]) -> StepPlan:
        """The plan of a step that computes `spans`, at most one of each sequence."""
        order = sorted(range(len(spans)), key=lambda index: self._shape(spans[index]))
        ordered = [spans[index] for index in order]
        members = [list(group) for _, group in groupby(ordered, key=self._shape)]
        positions = [position for span in ordered for position in range(span.start, span.end)]
        size, slots, begun_blocks = self._block_size, list[int](), list[int]()
        first_rows, num_rows = [0] * len(spans), 0
        for index, span in zip(order, ordered, strict=True):
            table = span.block_table
            slots += [table[position // size] * size + position % size for position in range(span.start, span.end)]
            begun_blocks += table[self._num_blocks(span.start) : self._num_blocks(span.end)]
            first_rows[index], num_rows = num_rows, num_rows + span.length
        group_rows = self._group_rows(members) if self._has_few_shapes else None
        places = [0] * self._rounded(len(positions))
        for place, row in reversed(list(enumerate(chain.from_iterable(group_rows or ())))):
            places[row] = place  # the first place of a row; its repetitions are padding
        groups, start = list[SpanGroup](), 0
        for index, alike in enumerate(members):
            end = start + sum(span.length for span in alike)
            rows = slice(start, end) if group_rows is None else self._indices(group_rows[index])
            filled, length = self.filled(alike, NO_SPAN), self._rounded(alike[0].length)
            views = {window: self._view(filled, length, window) for window in self._windows}
            groups.append(SpanGroup(len(filled), length, rows, views))
            start = end
        return StepPlan(
            first_rows=first_rows,
            positions=self._indices(self.filled(positions, 0)),
            slots=self._indices(self.filled(slots, self._scratch_block * self._block_size)),
            begun_blocks=self._indices(self.filled(begun_blocks, self._scratch_block)),
            groups=groups,
            places=self._indices(places) if group_rows else None,
        )

    def filled(self, values: list[T], filler: T) -> list[T]:
        """`values`, padded with `filler` to a length that does not add a shape."""
        return values + [filler] * (self._rounded(len(values)) - len(values))

    def _shape(self, span: Span) -> tuple[int, int]:
        """Spans of one shape share a group: the same length, and a context within a factor of two."""
        return self._rounded(span.length), (self._num_blocks(span.end) - 1).bit_length()

    def _rounded(self, number: int) -> int:
        """`number`, rounded up to a power of two if the number of different shapes must stay small."""
        return 1 << (number - 1).bit_length() if number and self._has_few_shapes else number

    def _group_rows(self, members: list[list[Span]]) -> list[list[int]]:
        """The step's rows of each group: a span is padded with its first row, the group with row 0."""
        groups: list[list[int]] = []
        start = 0
        for spans in members:
            length = self._rounded(spans[0].length)
            rows: list[list[int]] = []
            for span in spans:
                rows.append([*range(start, start + span.length), *[start] * (length - span.length)])
                start += span.length
            filled_up = self.filled(rows, [0] * length)
            groups.append(list(chain.from_iterable(filled_up)))
        return groups

    def _view(self, spans: list[Span], length: int, window: int | None) -> KeyView:
        """Each span's blocks from the first that its window reaches, padded to the longest with the null block."""
        firsts = [0 if window is None else max(0, span.start - window + 1) // self._block_size for span in spans]
        tables = [
            span.block_table[first : self._num_blocks(span.end)] for first, span in zip(firsts, spans, strict=True)
        ]
        width = self._rounded(max(len(table) for table in tables))
        blocks = [[*table, *[self._null_block] * (width - len(table))] for table in tables]
        queries = self._indices([span.start for span in spans]).unsqueeze(1) + self._arange(length)  # [B, length]
        keys = self._indices(firsts).unsqueeze(1) * self._block_size + self._arange(width * self._block_size)
        distance = queries.unsqueeze(2) - keys.unsqueeze(1)  # [B, length, keys]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -math.inf)
        mask = mask.repeat_interleave(self._group_size, dim=1).unsqueeze(1)
        return KeyView(self._indices(blocks).flatten(), mask)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _indices(self, values: Sequence[int] | list[list[int]]) -> Tensor:
        return send(np.array(values, np.int64), self._device)

    def _arange(self, length: int) -> Tensor:
        return torch.arange(length, device=self._device)


def attend(query: Tensor, cache: LayerCache, plan: StepPlan, window: int | None) -> Tensor:
    """Attention of every row of `query` [T, Hq, D] to its sequence's cache, its own key included: [T, Hq · D]."""
    outputs: list[Tensor] = []
    for group in plan.groups:
        view = group.views[window]
        pages = [each.read(view.blocks, query.dtype) for each in (cache.keys, cache.values)]  # [B · N, size, Hk, D]
        keys, values = (each.reshape(group.num_spans, -1, *each.shape[2:]).transpose(1, 2) for each in pages)
        num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
        # Folding a group's query heads into the query length is up to 7 times faster in bfloat16 than `enable_gqa`.
        taken = group.take(query).reshape(group.num_spans, group.length, num_kv_heads, -1)
        folded = taken.transpose(1, 2).reshape(group.num_spans, num_kv_heads, -1, head_dim)  # [B, Hk, length · G, D]
        output = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=view.mask)
        output = output.reshape(group.num_spans, num_kv_heads, group.length, -1).transpose(1, 2)
        outputs.append(output.reshape(group.num_spans * group.length, -1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if plan.places is None else joined.index_select(0, plan.places)

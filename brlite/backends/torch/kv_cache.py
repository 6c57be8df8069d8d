"""The paged KV cache: keys and values of every layer in blocks, allocated once. It has block numbers, no sequences.

There are two additional blocks. One is always zero: tables are padded with it. The values of masked slots are
multiplied by zero, and 0 · NaN is NaN, so padding and the unwritten rest of a block must be finite. The other block is
for rows that only pad a step: it is written and never read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brlite.models.config import KVDtype, ModelConfig


class Pages:
    """Heads of many positions, addressed by slot (block · block_size + offset) or by block.

    `values` are [blocks, block_size, Hk, D]. In int8 they have `scales` [blocks, block_size, Hk, 1], one for each token
    and head.
    """

    def __init__(self, values: Tensor, scales: Tensor | None = None) -> None:
        self.values = values
        self.scales = scales
        self._slots = values.flatten(0, 1)
        self._slot_scales = None if scales is None else scales.flatten(0, 1)

    def write(self, slots: Tensor, heads: Tensor) -> None:
        """Store `heads` [T, Hk, D] at `slots` [T]."""
        if self._slot_scales is not None:
            heads = heads.float()
            scales = heads.abs().amax(dim=-1, keepdim=True) / 127
            levels = (heads / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127)
            heads = levels.nan_to_num_()  # int8 cannot hold a NaN: the scale of its head is NaN instead
            self._slot_scales.index_copy_(0, slots, scales)
        self._slots.index_copy_(0, slots, heads.to(self.values.dtype))

    def read(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of `blocks` [N]: [N, block_size, Hk, D] in `dtype`."""
        found = self.values.index_select(0, blocks)
        return (found if self.scales is None else found * self.scales.index_select(0, blocks)).to(dtype)


TORCH_DTYPES: dict[KVDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class LayerCache(NamedTuple):
    keys: Pages
    values: Pages


class KVCache:
    """The blocks of all layers. `null_block` stays zero; rows that only pad a shape write to `scratch_block`."""

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: KVDtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.null_block = num_blocks
        self.scratch_block = num_blocks + 1
        # One tensor holds all layers' keys and values, so that one call clears a block in all layers.
        shape = (config.num_layers, 2, num_blocks + 2, block_size, config.num_kv_heads, config.head_dim)
        self._values = torch.zeros(shape, dtype=TORCH_DTYPES[dtype], device=device)
        self._scales = torch.zeros((*shape[:-1], 1), device=device) if dtype == "int8" else None
        self.layers = [LayerCache(self._pages(layer, 0), self._pages(layer, 1)) for layer in range(config.num_layers)]

    def clear(self, blocks: Tensor) -> None:
        """Set `blocks` [N] to zero in every layer. Call it before a new sequence writes to them."""
        self._values.index_fill_(2, blocks, 0)
        if self._scales is not None:
            self._scales.index_fill_(2, blocks, 0)

    @property
    def num_bytes(self) -> int:
        return self._values.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def _pages(self, layer: int, kind: int) -> Pages:
        return Pages(self._values[layer, kind], None if self._scales is None else self._scales[layer, kind])

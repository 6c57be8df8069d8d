"""The plan of a decoder: a flat list of operations with their tensors, made once from config, weights and cache.

This is the native counterpart of `models/decoder.py`: the same mathematics in the same order, as data. Ranks that
compute one decoder have a plan each: of their heads, and of some outputs of every matrix.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import NamedTuple

from brlite.backends.native import abi
from brlite.backends.native.memory import NativeMemory
from brlite.backends.native.packer import PackedWeights
from brlite.backends.native.step_rows import OwnRows, Rows, SharedRows
from brlite.models.config import ModelConfig
from brlite.models.rope_tables import pair_tables
from brlite.models.shards import Shard, head_ranges, hidden_range, mlp_range, shared_config, vocabulary_range


class PagedCache:
    """The KV cache in pages of 16 tokens, a layer after the other; a block is one page or several."""

    def __init__(
        self, library: ctypes.CDLL, config: ModelConfig, *, num_blocks: int, block_size: int, is_int8: bool
    ) -> None:
        self.format = abi.INT8 if is_int8 else abi.BF16
        self.num_blocks = num_blocks
        self.pages_per_block = block_size // abi.LANES
        page_bytes: int = library.brlite_page_bytes(self.format, config.head_dim)
        self._layer_bytes: int = num_blocks * self.pages_per_block * config.num_kv_heads * page_bytes
        self.memory = NativeMemory(library, self._layer_bytes * config.num_layers, "the KV cache")

    def layer(self, index: int) -> int:
        """The address of a layer's pages."""
        return self.memory.address + index * self._layer_bytes

    def close(self) -> None:
        self.memory.close()


class RankContext(NamedTuple):
    """One rank's place among those of a plan, which share some rows."""

    share: Shard
    shared: SharedRows


class NativePlan:
    """A `struct brlite_plan` with all that it points to. `close` gives the buffers back, not weights and cache.

    With a `seat` it is one rank's; `config` is the whole model's.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        weights: PackedWeights,
        cache: PagedCache,
        *,
        max_rows: int,
        max_positions: int,
        seat: RankContext | None = None,
    ) -> None:
        share = seat.share if seat else Shard(0, 1, sums=False)
        self.config = config
        self._own = shared_config(config, share) if seat else config
        self._heads, _ = head_ranges(config, share)
        self._mlp, self._hidden = mlp_range(config, share), hidden_range(config, share)
        self._vocabulary = vocabulary_range(config, share)
        self._seat = seat
        self._weights = weights
        self._cache = cache
        self._buffers = _Buffers(library, config, self._own, max_rows, seat)
        self._rope = pair_tables(config.rope, max_positions)
        body = list(self._body())
        self._body_array = (abi.Operation * len(body))(*body)
        self.struct = abi.Plan(
            body=ctypes.addressof(self._body_array),
            num_operations=len(body),
            max_rows=max_rows,
            vocab_size=config.vocab_size,
            max_blocks=cache.num_blocks,
            attention=self._attention(max_positions),
            norm=self._norm("norm"),
            head=self._head(),
            logits=self._buffers.logits.address,
            meeting=seat.shared.meeting if seat else None,
            num_ranks=share.size,
            rank=share.rank,
        )

    def close(self) -> None:
        self._buffers.close()

    def _body(self) -> Iterator[abi.Operation]:
        buffers = self._buffers
        yield self._embed()
        for index in range(self.config.num_layers):
            prefix = f"layers.{index}."
            yield self._norm(f"{prefix}attention_norm")
            yield self._linear(f"{prefix}qkv", buffers.qkv)
            yield self._rotate(index)
            yield abi.Operation(
                kind=abi.ATTEND,
                **buffers.attended.column(self._heads.start * self.config.head_dim).as_output,
                pages=self._cache.layer(index),
                window=self.config.window(index) or 0,
                meets=self._meets,
            )
            yield self._activate(abi.QUANTIZE, buffers.attended, self.config.q_size)
            yield self._linear(f"{prefix}o", buffers.hidden.column(self._hidden.start), adds=True)
            yield self._norm(f"{prefix}mlp_norm")
            yield self._linear(f"{prefix}gate_up", buffers.gate_up)
            yield from self._gate()
            yield self._linear(f"{prefix}down", buffers.hidden.column(self._hidden.start), adds=True)

    def _gate(self) -> Iterator[abi.Operation]:
        """Ranks join what comes of gate and up before it is quantised: a row of it has one scale."""
        buffers = self._buffers
        if self._seat is None:
            yield self._activate(abi.SILU, buffers.gate_up, self.config.intermediate_size)
            return
        product = self._seat.shared.product
        yield abi.Operation(
            kind=abi.GATE,
            num_inputs=len(self._mlp),
            **buffers.gate_up.as_input,
            output=product.column(self._mlp.start).address,
            output_row_size=product.row_size,
            meets=True,
        )
        yield self._activate(abi.QUANTIZE, product, self.config.intermediate_size)

    def _head(self) -> abi.Operation:
        name = "head" if self._weights.tensor("head.weight") else "embedding"
        head = self._linear(name, self._buffers.logits.column(self._vocabulary.start))
        head.meets = self._meets
        return head

    def _rotate(self, layer: int) -> abi.Operation:
        norms = (f"layers.{layer}.q_norm", f"layers.{layer}.k_norm")
        query_norm, key_norm = map(self._weights.address, norms) if self.config.qk_norm else (None, None)
        return abi.Operation(
            kind=abi.ROPE,
            num_inputs=self.config.rotary_dim(layer),
            epsilon=self.config.rms_norm_eps,
            weight=query_norm,
            bias=key_norm,
            **self._buffers.qkv.as_input,
            pages=self._cache.layer(layer),
        )

    def _embed(self) -> abi.Operation:
        tensor = self._weights.layout.tensors["embedding"]
        return abi.Operation(
            kind=abi.EMBED,
            format=tensor.format,
            is_table=tensor.form == "table",
            num_outputs=self.config.hidden_size,
            first=self._vocabulary.start,
            count=len(self._vocabulary),
            weight=self._weights.address("embedding"),
            **self._buffers.hidden.as_output,
            meets=self._meets,
        )

    def _norm(self, name: str) -> abi.Operation:
        operation = self._activate(abi.NORM, self._buffers.hidden, self.config.hidden_size)
        operation.weight = self._weights.address(name)
        operation.epsilon = self.config.rms_norm_eps
        return operation

    def _activate(self, kind: int, source: Rows, num_inputs: int) -> abi.Operation:
        return abi.Operation(kind=kind, format=self._format, num_inputs=num_inputs, **source.as_input)

    def _linear(self, name: str, target: Rows, *, adds: bool = False) -> abi.Operation:
        """What is added goes to the residual stream, which all ranks read."""
        weight = name if name == "embedding" else f"{name}.weight"
        tensor = self._weights.layout.tensors[weight]
        bias = f"{name}.bias"
        return abi.Operation(
            kind=abi.ADD if adds else abi.LINEAR,
            format=tensor.format,
            num_outputs=tensor.num_outputs,
            num_inputs=tensor.num_inputs,
            weight=self._weights.address(weight),
            bias=self._weights.address(bias) if self._weights.tensor(bias) else None,
            **target.as_output,
            meets=adds and self._meets,
        )

    @property
    def _meets(self) -> bool:
        return self._seat is not None

    @property
    def _format(self) -> int:
        """Of activations: that of the matrices, which are all alike."""
        return int(self._weights.layout.tensors["layers.0.qkv.weight"].format)

    def _attention(self, max_positions: int) -> abi.Attention:
        config = self.config
        return abi.Attention(
            num_heads=self._own.num_heads,
            num_kv_heads=self._own.num_kv_heads,
            head_dim=config.head_dim,
            rotary_dim=config.rope.rotary_dim,
            is_interleaved=config.rope.interleaved,
            kv_format=self._cache.format,
            pages_per_block=self._cache.pages_per_block,
            max_positions=max_positions,
            softmax_scale=1 / math.sqrt(config.head_dim),
            cos=self._rope.cos.ctypes.data,
            sin=self._rope.sin.ctypes.data,
        )


class _Buffers:
    """What operations hand to each other: of a rank's plan, what ranks share and what is its own."""

    def __init__(
        self, library: ctypes.CDLL, config: ModelConfig, own: ModelConfig, max_rows: int, seat: RankContext | None
    ) -> None:
        self._library = library
        self._owned: list[OwnRows] = []
        self.qkv = self._own(max_rows, own.q_size + 2 * own.kv_size)
        self.gate_up = self._own(max_rows, 2 * own.intermediate_size)
        if seat is not None:
            self.hidden, self.attended, self.logits = seat.shared.hidden, seat.shared.attended, seat.shared.logits
            return
        self.hidden = self._own(max_rows, config.hidden_size)
        self.attended = self._own(max_rows, config.q_size)
        self.logits = self._own(abi.HEAD_ROWS, config.vocab_size)

    def close(self) -> None:
        for rows in self._owned:
            rows.close()

    def _own(self, num_rows: int, size: int) -> Rows:
        self._owned.append(OwnRows(self._library, num_rows, size))
        return self._owned[-1].rows

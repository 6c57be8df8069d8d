"""The plan of a decoder: a flat list of operations with their tensors, made once from config, weights and cache.

This is the native counterpart of `models/decoder.py`: the same mathematics in the same order, as data.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

from brlite.kernels import abi
from brlite.kernels.layout import padded
from brlite.kernels.memory import NativeMemory
from brlite.kernels.weights import PackedWeights
from brlite.models.config import ModelConfig
from brlite.models.rope_tables import pair_tables


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


class NativePlan:
    """A `struct brlite_plan` with all that it points to. `close` gives the buffers back, not weights and cache."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        weights: PackedWeights,
        cache: PagedCache,
        *,
        max_rows: int,
        max_positions: int,
    ) -> None:
        self.config = config
        self._weights = weights
        self._cache = cache
        self._buffers = _Buffers(library, config, max_rows)
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
            head=self._linear("head" if weights.tensor("head.weight") else "embedding", self._buffers.logits),
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
                **buffers.attended.as_output,
                pages=self._cache.layer(index),
                window=self.config.window(index) or 0,
            )
            yield self._activate(abi.QUANTIZE, buffers.attended, self.config.q_size)
            yield self._linear(f"{prefix}o", buffers.hidden, adds=True)
            yield self._norm(f"{prefix}mlp_norm")
            yield self._linear(f"{prefix}gate_up", buffers.gate_up)
            yield self._activate(abi.SILU, buffers.gate_up, self.config.intermediate_size)
            yield self._linear(f"{prefix}down", buffers.hidden, adds=True)

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
            weight=self._weights.address("embedding"),
            **self._buffers.hidden.as_output,
        )

    def _norm(self, name: str) -> abi.Operation:
        operation = self._activate(abi.NORM, self._buffers.hidden, self.config.hidden_size)
        operation.weight = self._weights.address(name)
        operation.epsilon = self.config.rms_norm_eps
        return operation

    def _activate(self, kind: int, source: _Buffer, num_inputs: int) -> abi.Operation:
        return abi.Operation(kind=kind, format=self._format, num_inputs=num_inputs, **source.as_input)

    def _linear(self, name: str, target: _Buffer, *, adds: bool = False) -> abi.Operation:
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
        )

    @property
    def _format(self) -> int:
        """Of activations: that of the matrices, which are all alike."""
        return int(self._weights.layout.tensors["layers.0.qkv.weight"].format)

    def _attention(self, max_positions: int) -> abi.Attention:
        config = self.config
        return abi.Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
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


class _Buffer:
    """Rows of floats, each padded with zeros to whole groups.

    One vector more lies behind the last row: SILU reads so far where the intermediate size is no multiple of 32.
    """

    def __init__(self, library: ctypes.CDLL, num_rows: int, size: int) -> None:
        row_size = padded(size)
        self._memory = NativeMemory(library, 4 * (num_rows * row_size + abi.LANES), "memory for a step")
        self.as_input = {"input": self._memory.address, "row_size": row_size}
        self.as_output = {"output": self._memory.address, "row_size": row_size}

    def close(self) -> None:
        self._memory.close()


class _Buffers:
    """What operations hand to each other."""

    def __init__(self, library: ctypes.CDLL, config: ModelConfig, max_rows: int) -> None:
        self.hidden = _Buffer(library, max_rows, config.hidden_size)
        self.qkv = _Buffer(library, max_rows, config.q_size + 2 * config.kv_size)
        self.attended = _Buffer(library, max_rows, config.q_size)
        self.gate_up = _Buffer(library, max_rows, 2 * config.intermediate_size)
        self.logits = _Buffer(library, abi.HEAD_ROWS, config.vocab_size)

    def close(self) -> None:
        for buffer in (self.hidden, self.qkv, self.attended, self.gate_up, self.logits):
            buffer.close()

"""Compiles a network to a plan: a flat list of native operations with their addresses, made once at loading.

Each rank has a plan of its own, for its heads and its outputs of every matrix.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from brlite.backends.native import abi
from brlite.backends.native.memory import NativeMemory
from brlite.backends.native.packer import PackedWeights
from brlite.backends.native.step_rows import Rows, StepBuffers, max_rows
from brlite.checkpoint.load_plan import LoadPlan, num_cache_blocks
from brlite.errors import ConfigError
from brlite.models.config import FLOAT32_BYTES
from brlite.models.network import Attend, Embed, Gate, HeadNorm, Multiply, Norm, Operation, Rotate, build_network
from brlite.models.rope_tables import pair_tables
from brlite.models.shards import Shard, head_ranges, hidden_range, mlp_range, vocabulary_range

NO_SQUARES: Mapping[str, int] = MappingProxyType({})


class PagedCache:
    """The KV cache in pages of 16 tokens, layer by layer. A block is one or more pages."""

    def __init__(self, library: ctypes.CDLL, plan: LoadPlan) -> None:
        """Allocate it. Raises `ConfigError` if there is not enough memory."""
        config = plan.rank_config
        self.format = abi.INT8 if plan.precision.kv == "int8" else abi.BF16
        self.pages_per_block = math.ceil(plan.engine.block_size / abi.LANES)
        self.num_blocks = num_cache_blocks(plan.spec, self.pages_per_block * abi.LANES)
        page_bytes: int = library.brlite_page_bytes(self.format, config.head_dim)
        self._layer_bytes: int = self.num_blocks * self.pages_per_block * config.num_kv_heads * page_bytes
        try:
            self.memory = NativeMemory(library, self._layer_bytes * config.num_layers, "the KV cache")
        except ConfigError as error:
            raise ConfigError(f"{error}; lower build_batch, build_seq or num_blocks") from error

    def layer(self, index: int) -> int:
        """The address of a layer's pages."""
        return self.memory.address + index * self._layer_bytes

    def close(self) -> None:
        self.memory.close()


class NativePlan:
    """A `struct brlite_plan`, which points to weights, cache and buffers. With shared rows it is the plan of a shard.

    Activations are int8, with one scale for 32 inputs, if the precision says so; the weights must then be int8 or 4
    bits.
    """

    def __init__(
        self,
        plan: LoadPlan,
        weights: PackedWeights,
        cache: PagedCache,
        buffers: StepBuffers,
        squares: Mapping[str, int] = NO_SQUARES,
    ) -> None:
        """`squares` has addresses of float64 [num_inputs], by a matrix's name: steps add the squares of its inputs."""
        shard = plan.shard or Shard(0, 1, sums=False)
        config = self.config = plan.config  # the whole model's
        self._own = plan.rank_config
        self._heads, _ = head_ranges(config, shard)
        self._mlp, self._hidden = mlp_range(config, shard), hidden_range(config, shard)
        self._vocabulary = vocabulary_range(config, shard)
        self._weights = weights
        self._has_int8_rows = plan.precision.has_int8_activations
        self._cache = cache
        self._buffers = buffers
        self._squares = squares
        self._rope = pair_tables(config.rope, plan.spec.build_seq)
        network = build_network(config)
        body, (head,) = list(self._compile(network.body)), self._multiply(network.head)
        self._body_array = (abi.NativeOperation * len(body))(*body)
        self.struct = abi.Plan(
            body=ctypes.addressof(self._body_array),
            num_operations=len(body),
            max_rows=max_rows(plan),
            vocab_size=config.vocab_size,
            max_blocks=cache.num_blocks,
            attention=self._attention(plan.spec.build_seq),
            norm=self._norm(network.norm),
            head=head,
            logits=buffers.logits.address,
            meeting=buffers.shared.meeting if buffers.shared else None,
            num_ranks=shard.size,
            rank=shard.rank,
        )

    def _compile(self, operations: Iterable[Operation]) -> Iterator[abi.NativeOperation]:
        """One native operation normalises, rotates and stores heads. A native norm also quantizes its output."""
        heads: dict[str, Any] = {}  # fields of the next ROPE operation
        for operation in operations:
            match operation:
                case Embed():
                    (tensor,) = self._weights.layout.tensors[operation.weight.name]
                    yield abi.NativeOperation(
                        kind=abi.EMBED,
                        format=tensor.format,
                        is_table=tensor.form == "table",
                        num_outputs=self.config.hidden_size,
                        first=self._vocabulary.start,
                        count=len(self._vocabulary),
                        weight=self._weights.address(operation.weight.name),
                        **self._buffers.hidden.as_output,
                        meets=self._meets,
                    )
                case Norm():
                    yield self._norm(operation)
                case Multiply():
                    yield from self._multiply(operation)
                case HeadNorm(query, key, epsilon) if not heads:  # the kernel normalises, then rotates
                    addresses = self._weights.address(query.name), self._weights.address(key.name)
                    heads |= {"weight": addresses[0], "bias": addresses[1], "epsilon": epsilon}
                case Rotate(rotary_dim):
                    heads["num_inputs"] = rotary_dim
                case Attend():
                    yield from self._attend(operation, heads)
                    heads = {}
                case Gate(size):
                    yield from self._gate(size)
                case _:
                    raise NotImplementedError(f"native code has no form of {operation} here")

    def _attend(self, operation: Attend, heads: dict[str, Any]) -> Iterator[abi.NativeOperation]:
        pages = self._cache.layer(operation.layer)
        yield abi.NativeOperation(kind=abi.ROPE, **heads, **self._buffers.qkv.as_input, pages=pages)
        yield abi.NativeOperation(
            kind=abi.ATTEND,
            **self._buffers.attended.column(self._heads.start * self.config.head_dim).as_output,
            pages=pages,
            window=operation.window or 0,
            meets=self._meets,
        )
        yield self._activate(abi.QUANTIZE, self._buffers.attended, self.config.q_size)

    def _gate(self, size: int) -> Iterator[abi.NativeOperation]:
        """Ranks exchange silu(gate) * up before it is quantized, since a quantized row has one scale."""
        buffers = self._buffers
        if buffers.shared is None:
            yield self._activate(abi.SILU, buffers.gate_up, size)
            return
        product = buffers.shared.product
        yield abi.NativeOperation(
            kind=abi.GATE,
            num_inputs=len(self._mlp),
            **buffers.gate_up.as_input,
            output=product.column(self._mlp.start).address,
            output_row_size=product.row_size,
            meets=True,
        )
        yield self._activate(abi.QUANTIZE, product, size)

    def _norm(self, operation: Norm) -> abi.NativeOperation:
        compiled = self._activate(abi.NORM, self._buffers.hidden, self.config.hidden_size)
        compiled.weight = self._weights.address(operation.weight.name)
        compiled.epsilon = operation.epsilon
        return compiled

    def _activate(self, kind: int, source: Rows, num_inputs: int) -> abi.NativeOperation:
        operation = abi.NativeOperation(kind=kind, format=self._format, num_inputs=num_inputs, **source.as_input)
        operation.has_int8_rows = self._has_int8_rows
        return operation

    def _multiply(self, operation: Multiply) -> Iterator[abi.NativeOperation]:
        """One operation for each part of the matrix.

        Each rank writes its columns of the residual stream and of the logits, which all ranks read.
        """
        parts = self._weights.layout.tensors[operation.weight.name]
        target = {
            "qkv": self._buffers.qkv,
            "gate_up": self._buffers.gate_up,
            "hidden": self._buffers.hidden.column(self._hidden.start),
            "logits": self._buffers.logits.column(self._vocabulary.start),
        }[operation.output]
        bias = self._weights.address(operation.bias.name) if operation.bias else None
        for part in parts:
            yield abi.NativeOperation(
                kind=abi.ADD if operation.output == "hidden" else abi.LINEAR,
                format=part.format,
                num_outputs=part.num_outputs,
                num_inputs=part.num_inputs,
                weight=self._weights.part_address(part),
                bias=None if bias is None else bias + FLOAT32_BYTES * part.first_row,
                **target.column(part.first_row).as_output,
                meets=operation.output in ("hidden", "logits") and self._meets,
                is_part=part is not parts[-1],
                has_int8_rows=self._has_int8_rows,
                squares=self._squares.get(operation.weight.name) if part is parts[0] else None,
            )

    @property
    def _meets(self) -> bool:
        return self._buffers.shared is not None

    @property
    def _format(self) -> int:
        """Format of the activations: that of the matrix with the most requirements. All are bfloat16, or none is."""
        tensors = self._weights.layout.tensors.values()
        formats = {part.format for parts in tensors for part in parts if part.form == "panels"}
        with_sums = (abi.Q4_K, abi.INT4_MIN, abi.INT4_ZERO, abi.INT4, abi.Q6_K, abi.IQ4_NL, abi.IQ4_XS, abi.MXFP4)
        by_demand = (*with_sums, abi.INT8_F16, abi.INT8, abi.BF16)
        return next(each for each in by_demand if each in formats)

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

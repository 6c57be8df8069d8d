"""Compiles a network to launches of the kernels of this folder. `Decoder` is the same in plain torch.

The kernel that reads a product, not the one that computes it, adds its parts in order, and adds them to the residual
stream or makes heads of them. Nothing here waits for the device, so that a step can be captured as a graph. Launches
hold no reference to their decoder: in a cycle the tensors of a closed model would wait for the garbage collector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from brlite.backends.torch.device import shared_memory
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parallel import Group, JoinedHead, SummedLinear
from brlite.backends.torch.parameters import Parameters, scales_name
from brlite.backends.torch.rope import rope_tables
from brlite.backends.torch.triton import attention, rope, rows
from brlite.backends.torch.triton.inputs import StepInputs
from brlite.backends.torch.triton.multiply import Matrix, multiply, multiply_gated
from brlite.models.config import ModelConfig
from brlite.models.network import Attend, Embed, Gate, HeadNorm, Multiply, Norm, Operation, Rotate, build_network


class Product(NamedTuple):
    """`values` [parts, T, N] float32, to be added up in order, and then `bias` [N]."""

    values: Tensor
    bias: Tensor | None


@dataclass
class LaunchedStep:
    """The data that a step's launches share. The next norm adds `product` to `hidden` [T, H] float32."""

    decoder: TritonDecoder
    hidden: Tensor
    inputs: StepInputs
    product: Product | None = None


# Its input is the output of the previous launch: activations [T, K] in bfloat16, or a product.
Launch = Callable[[Tensor | Product, LaunchedStep], Tensor | Product]


class TritonDecoder:
    """A loaded model and its cache. Matrices, keys and values must be in bfloat16 or int8."""

    def __init__(self, config: ModelConfig, parameters: Parameters, cache: KVCache, *, max_length: int) -> None:
        self.config = config
        self.parameters = parameters
        self.cache = cache
        self.device = parameters.named["embedding"].device
        self.shape = attention.AttentionShape.of(config, max_length, shared_memory(self.device))
        self.rope = rope_tables(config.rope, max_length, self.device)
        self._network = build_network(config)
        head = parameters.linears[self._network.head.name]
        self._join = head.join if isinstance(head, JoinedHead) else None
        self._head = self._take(self._network.head)
        self._body = list(self._compile(self._network.body))

    def forward(self, inputs: StepInputs) -> Tensor:
        """Compute a step's tokens; store their keys and values; return hidden states [T, H]."""
        step = LaunchedStep(self, self.parameters.look_up(inputs.token_ids), inputs)
        x: Tensor | Product = step.hidden
        for launch in self._body:
            x = launch(x, step)
        _add_norm(step.hidden, step.product, None, 0.0, torch.bfloat16)
        return step.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The vocabulary's logits [R, V] in float32 for rows [R, H] that `forward` returned."""
        total = _summed(multiply(self.normed(hidden, torch.bfloat16), self._head))
        return total if self._join is None else self._join(total)

    def normed(self, hidden: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The final norm of rows [R, H] that `forward` returned: the input of the head."""
        norm = self._network.norm
        return _add_norm(hidden, None, self.parameters.named[norm.weight.name], norm.epsilon, dtype)

    def _compile(self, operations: Iterable[Operation]) -> Iterator[Launch]:
        named = self.parameters.named
        head_norm: HeadNorm | None = None
        is_turned = False
        gated: Matrix | None = None
        for operation in operations:
            match operation:
                case Embed():
                    pass  # `forward` looks it up at the start of a step
                case Norm():
                    yield partial(_norm, named[operation.weight.name], operation.epsilon)
                case Multiply(output="gate_up"):
                    gated = self._take(operation)
                case Multiply(output="hidden"):
                    linear = self.parameters.linears[operation.name]
                    group = linear.group if isinstance(linear, SummedLinear) else None
                    yield partial(_add, self._take(operation), group)
                case Multiply():
                    yield partial(_product, self._take(operation))
                case HeadNorm():
                    head_norm = operation
                case Rotate():
                    is_turned = True
                case Attend():
                    yield partial(_attend, operation, head_norm, is_turned)
                    head_norm, is_turned = None, False
                case Gate() if gated is not None:
                    yield partial(_gate, gated)
                case _:
                    raise NotImplementedError(f"the kernels for cards have no form of {operation} here")

    def _take(self, operation: Multiply) -> Matrix:
        """The matrix of a product, or a rank's part of it. Copies int8 weights to a new layout and frees the old."""
        name, linear = operation.weight.name, self.parameters.linears.pop(operation.name)
        own = linear.own if isinstance(linear, SummedLinear | JoinedHead) else linear
        matrix = Matrix.of(own, operation.weight.shape[1])
        if matrix.scales is not None:
            self.parameters.named[name], self.parameters.named[scales_name(name)] = matrix.values, matrix.scales
        return matrix


def _attend(
    operation: Attend, norm: HeadNorm | None, is_turned: bool, qkv: Tensor | Product, step: LaunchedStep
) -> Tensor:
    assert isinstance(qkv, Product)
    decoder, inputs = step.decoder, step.inputs
    config, named = decoder.config, decoder.parameters.named
    keys, values = decoder.cache.layers[operation.layer]
    pages = attention.LayerPages(keys.values, values.values, keys.scales, values.scales)
    num_rows, heads = inputs.num_rows, config.num_heads + 2 * config.num_kv_heads
    query = torch.empty((num_rows, config.num_heads, config.head_dim), dtype=torch.bfloat16, device=decoder.device)
    rope.store_heads_kernel[(num_rows, heads)](
        *(qkv.values, qkv.bias),
        *((named[norm.query.name], named[norm.key.name]) if norm else (None, None)),
        *(decoder.rope.cos, decoder.rope.sin, inputs.positions, inputs.slots),
        *(query, *pages),
        *(num_rows, norm.epsilon if norm else 0.0),
        NUM_PARTS=len(qkv.values),
        NUM_HEADS=config.num_heads,
        NUM_KV_HEADS=config.num_kv_heads,
        HEAD_DIM=config.head_dim,
        ROTARY_DIM=config.rope.rotary_dim if is_turned else 0,
        IS_INTERLEAVED=config.rope.interleaved,
        HAS_BIAS=qkv.bias is not None,
        HAS_NORM=norm is not None,
        IS_INT8=pages.key_scales is not None,
        BLOCK_DIM=triton.next_power_of_2(config.head_dim),
        num_warps=1,
        enable_fp_fusion=False,
    )
    return attention.attend(query, pages, inputs, decoder.shape, window=operation.window or 0)


def _norm(weight: Tensor, epsilon: float, _: Tensor | Product, step: LaunchedStep) -> Tensor:
    product, step.product = step.product, None
    return _add_norm(step.hidden, product, weight, epsilon, torch.bfloat16)


def _add_norm(
    hidden: Tensor, product: Product | None, weight: Tensor | None, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """Add a product to `hidden`; return the norm of the sum in `dtype`. Without a weight the result is not written."""
    out = torch.empty_like(hidden, dtype=dtype)
    values, bias = product or (None, None)
    rows.add_norm_kernel[(len(hidden),)](
        *(hidden, values, bias, weight, out, len(hidden), hidden.shape[1], epsilon),
        NUM_PARTS=0 if values is None else len(values),
        HAS_BIAS=bias is not None,
        HAS_NORM=weight is not None,
        BLOCK=triton.next_power_of_2(hidden.shape[1]),
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out


def _product(matrix: Matrix, x: Tensor | Product, _: LaunchedStep) -> Product:
    assert isinstance(x, Tensor)
    return Product(multiply(x, matrix), matrix.bias)


def _add(matrix: Matrix, group: Group | None, x: Tensor | Product, step: LaunchedStep) -> Tensor:
    """Leave a product for the next norm to add. With a group its parts are the ranks' products, in their order."""
    assert isinstance(x, Tensor)
    step.product = Product(multiply(x, matrix), matrix.bias)
    if group is not None:
        own = _summed(step.product.values)
        step.product = Product(torch.stack(group.gather(own if matrix.bias is None else own.add_(matrix.bias))), None)
    return x


def _summed(parts: Tensor) -> Tensor:
    """The sum of a product's parts, added in order. Overwrites them."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _gate(matrix: Matrix, x: Tensor | Product, _: LaunchedStep) -> Tensor:
    assert isinstance(x, Tensor)
    return multiply_gated(x, matrix)

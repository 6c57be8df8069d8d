"""Matrix products whose bits do not depend on how many rows are multiplied: weights [N, K] times rows [M, K].

The weights are the left operand of the matrix units and the rows the right one, so a tile always has 64 or 128 outputs,
and a small batch wastes no work. The inputs are summed in segments (split-K), whose number depends on the matrix's
shape alone. If few programs would run, segments are computed in parallel and each sum is written (`parts`). Else one
program computes and adds them in order. The kernel that reads the product adds the parts in the same order.
Weights in groups (`GroupedLinear`) are dequantized to bfloat16 in the product. They are stored group after group,
[K / 32, N, 8] words of four, or [K / 32, N, 4] of eight, so that a program's reads are contiguous. A word holds the
weights that one thread gives to the matrix units (`pack_words`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from brlite.backends.torch.graph_memory import MAX_PARTS
from brlite.backends.torch.parameters import GroupedLinear, Linear
from brlite.backends.torch.triton.precision import DOT, dequantized
from brlite.models.config import QUANTIZATION_GROUP
from brlite.models.precision import MatrixForm

MAX_NARROW_ROWS = 128  # with more rows, weights in groups are widened before the product
SEGMENT_STEP = 128  # a segment is a multiple of this number of inputs
_WANTED_PROGRAMS = 264  # two for each of a large card's multiprocessors
_NARROW_TILE = 64
_GROUP: tl.constexpr = tl.constexpr(QUANTIZATION_GROUP)


@dataclass(frozen=True)
class Matrix:
    """The weights of a product as the kernels read them.

    Without `scales`, `values` are [N, K] in bfloat16. With them they are [K / 32, N, 4 or 8] words, and `scales` are
    [K / 32, N]: float32 numbers in the form "int8", else words of two float16 numbers, scale and offset. They share a
    word because loads of two bytes a thread are not prefetched.
    """

    num_outputs: int
    num_inputs: int
    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    form: MatrixForm = "bfloat16"

    @classmethod
    def of(cls, linear: Linear, num_inputs: int) -> Matrix:
        """The matrix that is used in place of `linear`. Weights in groups are copied, others shared."""
        weight = linear.weight
        if not isinstance(linear, GroupedLinear):
            return cls(len(weight), num_inputs, weight, None, linear.bias)
        codes = weight.view(*linear.scales.shape[:2], -1).transpose(0, 1)
        if linear.form == "int8":
            codes = codes.abs().view(torch.uint8) | (codes < 0).to(torch.uint8) << 7  # sign and magnitude
        scales = linear.scales if linear.form == "int8" else linear.scales.view(torch.int32).squeeze(-1)
        return cls(
            *(len(weight), num_inputs, pack_words(codes.view(torch.uint8)), scales.t().contiguous(), linear.bias),
            form=linear.form,
        )

    @property
    def stride(self) -> int:
        """Without groups: the numbers in `values` from one output to the next. With groups: the outputs of a group."""
        return self.values.stride(0) if self.scales is None else self.scales.stride(0)

    @property
    def kernel_form(self) -> MatrixForm:
        """The form for the kernels. They always read which code means 0, although in the form "int4" it is always 8."""
        return "int4_zero" if self.form == "int4" else self.form

    def outputs_from(self, start: int) -> tuple[Tensor, Tensor | None]:
        """Values and scales of the outputs from `start` on."""
        if self.scales is None:
            return self.values[start:], None
        return self.values[:, start:], self.scales[:, start:]


def pack_words(codes: Tensor) -> Tensor:
    """Bytes [..., 32], or [..., 16] with a 4-bit code for each 16 inputs, as words [..., 8 or 4] of four bytes.

    A word has the inputs i, i + 8, i + 1 and i + 9 of 16, which are one thread's in an instruction of the matrix units
    (mma.m16n8k16, wgmma: PTX ISA, "Register Fragments"), so that loads and registers need no byte to be moved.
    """
    halves = codes.reshape(*codes.shape[:-1], -1, 2, 4, 2)  # once or twice 16 bytes, each in two halves of four pairs
    return halves.movedim(-3, -1).reshape(*codes.shape[:-1], -1, 4).view(torch.int32).squeeze(-1)


def num_parts(num_outputs: int, num_inputs: int) -> int:
    """The number of segments in which the inputs of a matrix are summed."""
    tiles = -(-num_outputs // _NARROW_TILE)
    wanted = min(MAX_PARTS, max(1, _WANTED_PROGRAMS // tiles))
    return -(-num_inputs // segment_size(num_inputs, wanted))


def segment_size(num_inputs: int, parts: int) -> int:
    """The number of inputs of a segment; the last one may be shorter."""
    return -(-num_inputs // (parts * SEGMENT_STEP)) * SEGMENT_STEP


@triton.jit
def _inputs_of(x, rows, start, num_rows, num_inputs, IS_EVEN: tl.constexpr, SIZE: tl.constexpr):
    """SIZE inputs of `rows` of x, from `start` on: [SIZE, BLOCK_ROWS]."""
    inputs = start + tl.arange(0, SIZE)
    is_there = rows[:, None] < num_rows
    if not IS_EVEN:
        is_there &= inputs[None, :] < num_inputs
    pointers = x + rows[:, None].to(tl.int64) * num_inputs + inputs[None, :]
    return tl.trans(tl.load(pointers, mask=is_there, other=0).to(DOT))


@triton.jit
def _weights_of(
    values,
    scales,
    outputs,
    start,
    num_outputs,
    num_inputs,
    stride,
    FORM: tl.constexpr,
    IS_EVEN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The weights of `outputs` for SIZE inputs, from `start` on: [BLOCK_OUTPUTS, SIZE]. With groups: for whole ones."""
    is_there = outputs[:, None] < num_outputs
    if FORM != "bfloat16":
        NUM_GROUPS: tl.constexpr = SIZE // _GROUP
        WORDS: tl.constexpr = _GROUP // (4 if FORM == "int8" or FORM == "int8_f16" else 8)
        groups = tl.arange(0, NUM_GROUPS) + start // _GROUP
        factors = tl.load(scales + outputs[:, None] + groups[None, :].to(tl.int64) * stride, mask=is_there, other=0)
        factors = tl.broadcast_to(factors[:, :, None], [outputs.shape[0], NUM_GROUPS, WORDS])
        words = tl.arange(0, NUM_GROUPS * WORDS)
        places = (words // WORDS + start // _GROUP)[None, :].to(tl.int64) * stride + outputs[:, None]
        codes = tl.load(values + places * WORDS + (words % WORDS)[None, :], mask=is_there, other=0)
        return dequantized(codes, tl.reshape(factors, [outputs.shape[0], NUM_GROUPS * WORDS]), FORM, SIZE)
    inputs = start + tl.arange(0, SIZE)
    if not IS_EVEN:
        is_there &= inputs[None, :] < num_inputs
    pointers = values + outputs[:, None].to(tl.int64) * stride + inputs[None, :]
    return tl.load(pointers, mask=is_there, other=0).to(DOT)


@triton.jit
def _product(
    x,
    values,
    scales,
    rows,
    outputs,
    first,
    last,
    num_rows,
    num_outputs,
    num_inputs,
    stride,
    FORM: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The product of `outputs` and `rows` over the inputs from `first` to `last`: [BLOCK_OUTPUTS, BLOCK_ROWS]."""
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for start in tl.range(first, last, BLOCK_INPUTS, num_stages=STAGES):
        weights = _weights_of(
            values, scales, outputs, start, num_outputs, num_inputs, stride, FORM, IS_EVEN, BLOCK_INPUTS
        )
        total = tl.dot(weights, _inputs_of(x, rows, start, num_rows, num_inputs, IS_EVEN, BLOCK_INPUTS), total)
    return total


@triton.jit(do_not_specialize=("num_rows",))
def multiply_kernel(
    x,
    values,
    scales,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    stride,
    segment,
    FORM: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_PART: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [parts, M, N] float32 = x [M, K] bfloat16 times a `Matrix`; parts is 1 unless `IS_PART`."""
    n_tile, m_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    outputs = n_tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    rows = m_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if HAS_SEGMENTS:
        total = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
        for first in range(0, num_inputs, segment):
            total += _product(
                x, values, scales, rows, outputs, first, min(first + segment, num_inputs),
                num_rows, num_outputs, num_inputs, stride,
                FORM, IS_EVEN, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_INPUTS, STAGES,
            )  # fmt: skip
    else:
        first = 0
        last = num_inputs
        if IS_PART:
            first = tl.program_id(2) * segment
            last = min(first + segment, num_inputs)
            out += tl.program_id(2).to(tl.int64) * num_rows * num_outputs
        total = _product(
            x, values, scales, rows, outputs, first, last,
            num_rows, num_outputs, num_inputs, stride,
            FORM, IS_EVEN, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_INPUTS, STAGES,
        )  # fmt: skip
    pointers = out + rows[None, :].to(tl.int64) * num_outputs + outputs[:, None]
    tl.store(pointers, total, mask=(outputs[:, None] < num_outputs) & (rows[None, :] < num_rows))


@triton.jit(do_not_specialize=("num_rows",))
def gated_kernel(
    x,
    values,
    scales,
    up_values,
    up_scales,
    bias,
    out,
    num_rows,
    size,
    num_inputs,
    stride,
    FORM: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [M, size] bfloat16 = silu(gate) times up, the products with two matrices; bias [2 size] is that of both."""
    n_tile, m_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    outputs = n_tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    rows = m_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    gate = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    up = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for start in tl.range(0, num_inputs, BLOCK_INPUTS, num_stages=STAGES):
        inputs = _inputs_of(x, rows, start, num_rows, num_inputs, IS_EVEN, BLOCK_INPUTS)
        weights = _weights_of(values, scales, outputs, start, size, num_inputs, stride, FORM, IS_EVEN, BLOCK_INPUTS)
        gate = tl.dot(weights, inputs, gate)
        weights = _weights_of(
            up_values, up_scales, outputs, start, size, num_inputs, stride, FORM, IS_EVEN, BLOCK_INPUTS
        )
        up = tl.dot(weights, inputs, up)
    if HAS_BIAS:
        gate += tl.load(bias + outputs, mask=outputs < size, other=0).to(tl.float32)[:, None]
        up += tl.load(bias + size + outputs, mask=outputs < size, other=0).to(tl.float32)[:, None]
    result = gate / (1 + tl.exp(-gate)) * up
    pointers = out + rows[None, :].to(tl.int64) * size + outputs[:, None]
    tl.store(pointers, result.to(tl.bfloat16), mask=(outputs[:, None] < size) & (rows[None, :] < num_rows))


@triton.jit
def _widen_kernel(values, scales, out, num_outputs, stride, FORM: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr):
    """out [N, groups · 32] bfloat16: the weights of a matrix in groups. Program (outputs, group)."""
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    group = tl.program_id(1)
    weights = _weights_of(values, scales, outputs, group * _GROUP, num_outputs, 0, stride, FORM, True, _GROUP)
    pointers = out + outputs[:, None].to(tl.int64) * tl.num_programs(1) * _GROUP + group * _GROUP
    pointers += tl.arange(0, _GROUP)[None, :]
    tl.store(pointers, weights.to(tl.bfloat16), mask=outputs[:, None] < num_outputs)


def multiply(x: Tensor, matrix: Matrix) -> Tensor:
    """The product [parts, M, N] in float32, without the bias, of x [M, K] bfloat16."""
    matrix = matrix if len(x) <= MAX_NARROW_ROWS else _widened(matrix)
    tile = choose_tile(len(x), matrix)
    num_programs = triton.cdiv(matrix.num_outputs, tile.outputs) * triton.cdiv(len(x), tile.rows)
    return multiply_in_tiles(x, matrix, tile, is_split=num_programs <= _WANTED_PROGRAMS // 2)


def multiply_in_tiles(x: Tensor, matrix: Matrix, tile: Tile, *, is_split: bool) -> Tensor:
    """As `multiply`, with this tile: the parts with `is_split`, else their sum."""
    num_rows, num_inputs, num_outputs = len(x), matrix.num_inputs, matrix.num_outputs
    segments = num_parts(num_outputs, num_inputs)
    parts = segments if is_split else 1
    out = x.new_empty((parts, num_rows, num_outputs), dtype=torch.float32)
    multiply_kernel[(triton.cdiv(num_outputs, tile.outputs), triton.cdiv(num_rows, tile.rows), parts)](
        *(x, matrix.values, matrix.scales, out, num_rows, num_outputs, num_inputs, matrix.stride),
        segment_size(num_inputs, segments),
        IS_PART=parts > 1,
        HAS_SEGMENTS=segments > parts,
        **tile.options(matrix),
    )
    return out


def multiply_gated(x: Tensor, matrix: Matrix, tile: Tile | None = None) -> Tensor:
    """silu(gate) times up, [M, N / 2] bfloat16; the outputs of the matrix are those of gate, then those of up."""
    num_rows, size = len(x), matrix.num_outputs // 2
    matrix = matrix if num_rows <= MAX_NARROW_ROWS else _widened(matrix)
    tile = tile or choose_tile(num_rows, matrix, is_gated=True)
    out = x.new_empty((num_rows, size))
    gated_kernel[(triton.cdiv(size, tile.outputs), triton.cdiv(num_rows, tile.rows))](
        *(x, matrix.values, matrix.scales, *matrix.outputs_from(size), matrix.bias, out),
        *(num_rows, size, matrix.num_inputs, matrix.stride),
        HAS_BIAS=matrix.bias is not None,
        **tile.options(matrix),
    )
    return out


def _widened(matrix: Matrix) -> Matrix:
    """The matrix in bfloat16, for a product of many rows: widening it in each tile of rows would take longer."""
    if matrix.scales is None:
        return matrix
    num_groups = len(matrix.values)
    out = matrix.values.new_empty((matrix.num_outputs, num_groups * QUANTIZATION_GROUP), dtype=torch.bfloat16)
    _widen_kernel[(triton.cdiv(matrix.num_outputs, 256), num_groups)](
        *(matrix.values, matrix.scales, out, matrix.num_outputs, matrix.stride),
        FORM=matrix.kernel_form,
        BLOCK_OUTPUTS=256,
        enable_fp_fusion=False,
    )
    return Matrix(matrix.num_outputs, matrix.num_inputs, out, None, matrix.bias)


class Tile(NamedTuple):
    """The tile of one program: `outputs` by `rows`, `inputs` at a time; `SEGMENT_STEP` is a multiple of `inputs`.

    It does not change the result's bits.
    """

    outputs: int
    rows: int
    inputs: int
    stages: int
    warps: int

    def options(self, matrix: Matrix) -> dict[str, int | str]:
        """The kernel's constants."""
        return {
            "FORM": matrix.kernel_form,
            "IS_EVEN": matrix.num_inputs % self.inputs == 0,
            "BLOCK_OUTPUTS": self.outputs,
            "BLOCK_ROWS": self.rows,
            "BLOCK_INPUTS": self.inputs,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "enable_fp_fusion": False,
        }


class Tiles(NamedTuple):
    """The tiles of products of up to `max_rows` rows."""

    max_rows: int
    plain: Tile
    gated: Tile


# Chosen by the times of bench/card.py on an H200. The tile for 65 to 128 rows was not measured: it is the tile for 64
# rows made larger, so that a matrix is read once (`bench/card.py --tiles` compares tiles).
TILES = (
    Tiles(16, Tile(64, 16, 128, 4, 4), Tile(64, 16, 128, 3, 4)),
    Tiles(32, Tile(64, 32, 128, 4, 4), Tile(64, 32, 128, 3, 4)),
    Tiles(64, Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
    Tiles(128, Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 3, 4)),
    Tiles(2**31, Tile(128, 128, 64, 3, 4), Tile(64, 256, 64, 3, 8)),
)
FEW_GATED_INT4 = Tile(64, 16, 64, 4, 4)  # 55.9 us for the 8B shape, where 128 inputs at a time take 61.1


def choose_tile(num_rows: int, matrix: Matrix, *, is_gated: bool = False) -> Tile:
    """The tile of a product of `num_rows` rows. Weights in groups of odd sizes are read one group at a time."""
    tiles = next(tiles for tiles in TILES if num_rows <= tiles.max_rows)
    tile = tiles.gated if is_gated else tiles.plain
    if is_gated and tile.rows == FEW_GATED_INT4.rows and matrix.form.startswith("int4"):
        tile = FEW_GATED_INT4
    is_odd = matrix.scales is not None and matrix.num_inputs % SEGMENT_STEP != 0
    return tile._replace(inputs=QUANTIZATION_GROUP) if is_odd else tile

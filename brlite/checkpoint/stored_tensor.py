"""A tensor as its file stores it: bytes and their format, widened to float32 on demand. Needs no torch.

Rows are read on demand, a few at a time, so memory use is little more than the result. Files are read, not mapped.
The used pages of a mapping count as this process's memory. If a file is cut short, using its mapping ends the process,
while a read raises an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason
from brlite.models.config import QUANTIZATION_GROUP

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
ReadBytes = Callable[[int, int], Bytes]  # (offset of the first byte in the tensor, number of bytes)

CHUNK_ELEMENTS = 1 << 17  # widened at once, so that the temporary arrays stay in the processor's cache: 3 times as fast
HALF_EXPONENT = 0x7C00  # the exponent's bits in half precision: all are set in infinities and NaN
SHORTEST = 1e-12  # rows are divided by at least this when they are scaled to length 1: zeros stay zeros


class Coded(NamedTuple):
    """Quantized rows: codes [R, C], and for each group of 32 codes a scale and maybe an offset [R, C / 32].

    Codes are 0 … 15, or int8 in two's complement. Scales and offsets are the bits of half-precision numbers. Offsets
    are minimums or zero points: the `MatrixForm` tells which.
    """

    codes: Bytes
    scales: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.uint16] | None = None


class Format(NamedTuple):
    """How a file stores numbers: `block_elements` of them in `block_bytes`. `widen` turns bytes [..., B] into [..., N].

    `decode` turns rows [R, B] of a quantized format into codes and scales. It is None for formats whose codes
    are not kept in memory. `are_finite` says of blocks [..., B] whether all of their scales are finite; only formats
    whose blocks are kept have it.
    """

    name: str
    block_elements: int
    block_bytes: int
    widen: Callable[[Bytes], Float32]
    decode: Callable[[Bytes], Coded] | None = None
    are_finite: Callable[[Bytes], bool] | None = None


F32 = Format("F32", 1, 4, lambda data: data.view("<f4"))
F16 = Format("F16", 1, 2, lambda data: data.view("<f2").astype(np.float32))
BF16 = Format("BF16", 1, 2, lambda data: from_bfloat16(data.view("<u2")))
PLAIN_FORMATS = {plain.name: plain for plain in (F32, F16, BF16)}
ALLOWED_DTYPES = "F32, F16 and BF16"


def are_finite(halves: npt.NDArray[np.uint16]) -> bool:
    """Whether these bits of half-precision numbers are of finite ones."""
    return not (halves & HALF_EXPONENT == HALF_EXPONENT).any()


class StoredTensor(msgspec.Struct, frozen=True):
    """One tensor of a checkpoint, or a part of it, of `shape`. It can be read until the checkpoint gives the next one.

    The file has the tensor in rows of `row_elements` numbers; a vector is one row. `rows` and `columns` are those that
    belong to this part. `head_rows` is the number of rows of a head (of a vector: its numbers) if the file orders them
    for rotary positions as llama.cpp does, in pairs of neighbours; else 0. Reading then puts the even rows of each head
    before the odd ones, as Hugging Face does. With `has_unit_rows`, reading scales each row to length 1.
    Errors name `file`, if there is one.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    read: ReadBytes
    row_elements: int
    rows: range
    columns: range
    head_rows: int = 0
    has_unit_rows: bool = False
    file: Path | None = None

    def part(self, rows: range, columns: range | None = None) -> StoredTensor:
        """The part with these rows (of a vector: numbers) and these columns or all. Other rows are not read."""
        if len(self.shape) < 2:
            return msgspec.structs.replace(
                self, shape=(len(rows),), columns=self.columns[rows.start : rows.stop], rows=self.rows
            )
        shape = (len(rows), *self.shape[1:]) if columns is None else (len(rows), len(columns))
        chosen = self.columns if columns is None else self.columns[columns.start : columns.stop]
        return msgspec.structs.replace(self, shape=shape, rows=self.rows[rows.start : rows.stop], columns=chosen)

    def stored(self, rows: range) -> Bytes:
        """Whole rows as the file has them, [R, bytes of a row]. `rows` counts from the whole tensor's first row."""
        row_bytes = self.row_elements // self.format.block_elements * self.format.block_bytes
        if not self.head_rows or len(self.shape) < 2:
            return self.read(rows.start * row_bytes, len(rows) * row_bytes).reshape(len(rows), row_bytes)
        first = rows.start // self.head_rows * self.head_rows
        num_heads = -(-(rows.stop - first) // self.head_rows)
        data = self.read(first * row_bytes, num_heads * self.head_rows * row_bytes)
        pairs = data.reshape(num_heads, -1, 2, row_bytes)  # [H, D/2, 2, B]
        in_order: Bytes = pairs.swapaxes(1, 2).reshape(-1, row_bytes)
        return in_order[rows.start - first : rows.stop - first]

    def coded(self) -> Coded:
        """The numbers as codes and scales, of a format that has `decode`. Columns must be whole groups of 32.

        Raises `ModelError` as `float32` does, and for scales or offsets that half precision cannot hold.
        """
        assert self.format.decode is not None, f"{self.name} has no codes"
        with np.errstate(over="ignore", invalid="ignore"):
            coded = self.format.decode(self.stored(self.rows))
        if len(self.columns) < self.row_elements:
            groups = slice(self.columns.start // QUANTIZATION_GROUP, self.columns.stop // QUANTIZATION_GROUP)
            codes = coded.codes[:, self.columns.start : self.columns.stop]
            offsets = None if coded.offsets is None else np.ascontiguousarray(coded.offsets[:, groups])
            coded = Coded(np.ascontiguousarray(codes), np.ascontiguousarray(coded.scales[:, groups]), offsets)
        if not (are_finite(coded.scales) and (coded.offsets is None or are_finite(coded.offsets))):
            raise self._not_finite(", or is beyond half precision")
        return coded

    def blocks(self) -> Bytes:
        """The whole rows as blocks [R, N, block_bytes], of a format that has `are_finite`. Raises as `coded` does."""
        assert self.format.are_finite is not None, f"{self.name} is not kept in blocks"
        assert len(self.columns) == self.row_elements, f"{self.name} is cut within its rows"
        blocks = self.stored(self.rows).reshape(len(self.rows), -1, self.format.block_bytes)
        if not self.format.are_finite(blocks):
            raise self._not_finite()
        return np.ascontiguousarray(blocks)

    def _not_finite(self, more: str = "") -> ModelError:
        source = "" if self.file is None else f"{self.file}: "
        return ModelError(f"{source}{excerpt(self.name)} has a scale that is not finite{more}")

    def float32(self) -> Float32:
        """The numbers in a new array that the caller may change. None is rounded.

        Raises `ModelError` where the file ends before them or cannot be read.
        """
        out = np.empty((len(self.rows), len(self.columns)), np.float32)
        step = max(1, CHUNK_ELEMENTS // max(1, self.row_elements))
        if self.head_rows:
            step = -(-step // self.head_rows) * self.head_rows
        for start in range(0, len(out) if out.size else 0, step):
            with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale may be infinite
                values = self.format.widen(self.stored(self.rows[start : start + step]))
            if self.head_rows and len(self.shape) < 2:
                values = values.reshape(-1, self.head_rows // 2, 2).swapaxes(1, 2).reshape(1, -1)
            piece = out[start : start + step]
            piece[:] = values[:, self.columns.start : self.columns.stop]
            if self.has_unit_rows:
                # Made float64 first: numpy's sums of cast numbers would depend on where in a piece a row lies.
                lengths = np.sqrt(np.square(piece).astype(np.float64).sum(axis=1, keepdims=True))
                piece /= np.maximum(lengths, SHORTEST).astype(np.float32)
        return out.reshape(self.shape)


class TensorLocation(NamedTuple):
    """A tensor's format and shape, and where its bytes begin in its file. `head_rows` is that of `StoredTensor`."""

    name: str
    format: Format
    shape: tuple[int, ...]
    begin: int = 0
    head_rows: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.format.block_elements * self.format.block_bytes


def make_tensor(location: TensorLocation, read: ReadBytes, file: Path | None = None) -> StoredTensor:
    """The whole tensor of a location in `file`. It calls `read` when its bytes are needed."""
    name, stored_as, shape, _, head_rows = location
    num_rows, row_elements = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    return StoredTensor(
        name, stored_as, shape, read, row_elements, range(num_rows), range(row_elements), head_rows, file=file
    )


def tensor_in_memory(name: str, stored_as: Format, shape: tuple[int, ...], data: Bytes) -> StoredTensor:
    """The tensor whose bytes are `data` [B]."""
    return make_tensor(TensorLocation(name, stored_as, shape), lambda begin, size: data[begin : begin + size])


class LocatedTensors:
    """The methods of `Checkpoint` for formats whose tensors are bytes in files, one after another."""

    def __init__(self, files: Mapping[Path, Sequence[TensorLocation]]) -> None:
        self._files = files
        self._written_ns = {file: file.stat().st_mtime_ns for file in files}
        self._locations = [location for locations in files.values() for location in locations]
        self.num_bytes = sum(location.num_bytes for location in self._locations)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {location.name: location.shape for location in self._locations}

    def formats(self) -> dict[str, str]:
        return {location.name: location.format.name for location in self._locations}

    def tensors(self) -> Iterator[StoredTensor]:
        """Yields the tensors of one file after another. A file is open while its tensors are read.

        Raises `ModelError` at the end of a file that was written meanwhile.
        """
        for file, locations in self._files.items():
            try:
                stream = file.open("rb")
            except OSError as error:
                raise ModelError(f"{file}: {reason(error)}") from error
            with stream:
                for location in locations:
                    yield make_tensor(location, partial(read_bytes, stream, location.begin), file)
                check_unchanged(stream, self._written_ns[file])


def read_bytes(stream: BufferedReader, tensor_begin: int, begin: int, num_bytes: int) -> Bytes:
    """`num_bytes` of the file from byte `tensor_begin` + `begin`. Any thread may read.

    Raises `ModelError` where the file ends before them or cannot be read.
    """
    data = np.empty(num_bytes, np.uint8)
    num_read = 0
    try:
        while num_read < num_bytes:
            position = tensor_begin + begin + num_read
            num_more = os.preadv(stream.fileno(), [data[num_read:].data], position)
            if not num_more:
                raise ModelError(f"{stream.name}: ends at byte {position}; it was longer when it was opened")
            num_read += num_more
    except OSError as error:
        raise ModelError(f"{stream.name}: {reason(error)}") from error
    return data


def check_unchanged(stream: BufferedReader, written_ns: int) -> None:
    """Raise `ModelError` if the file was written after that time: its tensors may be of old and of new content."""
    if os.fstat(stream.fileno()).st_mtime_ns != written_ns:
        raise ModelError(f"{stream.name}: has changed since it was opened")


def to_bfloat16(values: npt.NDArray[np.float32], *, keeps_subnormal: bool = True) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, halves to even; NaN stays NaN.

    Without `keeps_subnormal` a float32 below 2^-126 becomes 0 of its sign, as the kernels' own rounding does it.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    halves = bits >> 16
    magnitude = bits & 0x7FFFFFFF
    if int(np.bitwise_or.reduce(bits, axis=None, initial=0)) & 0xFFFF:  # most checkpoints hold bfloat16 numbers already
        rounded = (bits + np.uint32(0x7FFF) + (halves & 1)) >> 16
        halves = np.where(magnitude > 0x7F800000, halves | 0x40, rounded)
    if not keeps_subnormal:
        halves = np.where(magnitude < 0x00800000, (bits >> 16) & 0x8000, halves)
    return halves.astype(np.uint16)


def from_bfloat16(halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers of these bits: bfloat16 is the upper half of a float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)

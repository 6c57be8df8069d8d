"""Unpacks the quantized matrices of a safetensors folder into the rows of a plain weight. Reads no files.

A weight is (code - zero point) * scale. Each tool stores these three in its own layout. A class here is the layout of
AutoGPTQ, of AutoAWQ, of compressed-tensors (`pack-quantized`, `int-quantized`) or of DeepSeek's FP8.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from brlite.checkpoint.quantization import ACT_ORDER, FOLDER_FORMS, ZERO_POINTS, Quantization
from brlite.checkpoint.safetensors import TensorEntry
from brlite.checkpoint.stored_tensor import (
    PLAIN_FORMATS,
    Bytes,
    Coded,
    Float32,
    Format,
    StoredTensor,
    TensorLocation,
    make_tensor,
)
from brlite.errors import ModelError
from brlite.files.quoting import excerpt
from brlite.models.config import QUANTIZATION_GROUP

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
PartTypes = Mapping[str, tuple[str, ...]]  # last part of a tensor's name → its allowed types

FLOATS = tuple(PLAIN_FORMATS)
INTEGERS = ("I32", "I64")
SCALES = ("scales", "weight_scale", "weight_scale_inv")  # a matrix has one of them; codes are multiplied by it
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a 32-bit word of each of 8 neighbouring codes
BLOCK = np.dtype([("codes", "u1", QUANTIZATION_GROUP), ("scale", "<f4"), ("zero_point", "<i4")])
MAX_HALF = 65504.0
MAX_SCALE = 2.0**119  # any code is below 512: its product with this scale is finite in single precision

# The number of each byte of FP8 (E4M3 of OCP 8-bit floating point): 4 bits of exponent, 3 of mantissa, no infinities.
_BYTES = np.arange(256)
_EXPONENT, _MANTISSA = _BYTES >> 3 & 15, _BYTES & 7
_MAGNITUDE = np.where(_EXPONENT == 0, _MANTISSA / 8 * 2.0**-6, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7.0))
_MAGNITUDE[_BYTES & 127 == 127] = np.nan
E4M3_VALUES: Float32 = np.where(_BYTES >= 128, -_MAGNITUDE, _MAGNITUDE).astype(np.float32)


class UnpackedMatrix(NamedTuple):
    """A matrix [R, C] with G groups a row: `codes_of` gives the codes of some rows. Scales are [R or 1, G].

    Zero points broadcast to [R, G]. None: all are in the middle of the codes' range.
    """

    codes_of: Callable[[slice], Bytes]
    scales: Float32
    zero_points: npt.NDArray[np.int16] | None = None


class QuantizedMatrix(ABC):
    """One matrix, described by the headers of its tensors. `shape` is [outputs, inputs], `name` the plain weight's.

    Raises `ModelError` if a tensor is missing, or has another type or shape than its layout wants.
    """

    tensors: ClassVar[PartTypes]
    """The tensors of this layout. The first one holds the codes: a module that has it is quantized."""
    code_values: ClassVar[Float32 | None] = None
    """The number that each code stands for; None where codes are integers."""

    def __init__(self, name: str, quantization: Quantization, entries: Mapping[str, TensorEntry]) -> None:
        self.name, self.quantization = name, quantization
        self.num_bits = quantization.num_bits
        scales = sorted(entries.keys() & set(SCALES))
        optional = {*SCALES} if scales else set()
        optional |= set() if quantization.has_act_order else {"g_idx", "weight_g_idx"}
        optional |= {"weight_zero_point"} if quantization.is_symmetric else set()
        missing = sorted(part for part in self.tensors if part not in entries and part not in optional)
        if missing:
            raise ModelError(f"{excerpt(name)} is quantized, but has no {' and no '.join(missing)}")
        if len(scales) > 1:
            raise ModelError(f"{excerpt(name)} must have one of {' and '.join(scales)}")
        stored = entries[next(iter(self.tensors))].shape
        if len(stored) != 2 or 0 in stored:
            raise ModelError(f"{excerpt(name)} must be a matrix, not of shape {excerpt(list(stored))}")
        self.shape = outputs, inputs = self.find_shape(*stored)
        self.group_size = quantization.group_size or inputs
        self.num_groups = math.ceil(inputs / self.group_size)
        allowed: dict[str, list[Shape]] = {"g_idx": [(inputs,)], "weight_g_idx": [(inputs,)]}
        allowed |= self.allowed_shapes(outputs)
        for part, entry in entries.items():
            if entry.dtype not in self.tensors[part]:
                found, dtypes = excerpt(entry.dtype), " or ".join(self.tensors[part])
                raise ModelError(f"{part} of {excerpt(name)} has dtype {found}; allowed are {dtypes}")
            if entry.shape not in allowed.get(part, [entry.shape]):
                wanted = " or ".join(str(list(shape)) for shape in allowed[part])
                found = excerpt(list(entry.shape))
                raise ModelError(f"{part} of {excerpt(name)} has shape {found}; its layout wants {wanted}")
        self.format = self.find_format()

    def find_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Outputs and inputs of a matrix whose codes are a tensor of this shape."""
        return rows, columns

    @abstractmethod
    def allowed_shapes(self, outputs: int) -> dict[str, list[Shape]]:
        """The shapes that each of the other tensors may have."""

    @abstractmethod
    def unpack(self, arrays: Mapping[str, Array]) -> UnpackedMatrix:
        """Unpack the content of the tensors. Raises `ModelError` if it contradicts the headers."""

    def find_format(self) -> Format:
        """The format of the matrix. It has `decode` if its codes can be kept: if `FOLDER_FORMS` lists it."""
        quantization = self.quantization
        name = f"{quantization.method} {self.num_bits}-bit"
        name += "" if quantization.is_symmetric else ZERO_POINTS
        name += ACT_ORDER if quantization.has_act_order else ""
        if self.group_size % QUANTIZATION_GROUP or self.shape[1] % QUANTIZATION_GROUP:
            name += f" in groups of {self.group_size}"
        form = FOLDER_FORMS.get(name)
        if form is None:
            return Format(name, 1, 4, PLAIN_FORMATS["F32"].widen)

        def decode(data: Bytes) -> Coded:
            blocks = np.ascontiguousarray(data).view(BLOCK)
            codes = np.ascontiguousarray(blocks["codes"]).reshape(len(data), -1)
            scales, zero_points = (blocks[part].astype("<f2").view(np.uint16) for part in ("scale", "zero_point"))
            if form == "int8_f16":  # all zero points are 128: code - 128 as int8 in two's complement
                return Coded(codes ^ np.uint8(128), scales)
            return Coded(codes, scales, zero_points)

        def widen(data: Bytes) -> Float32:
            blocks = np.ascontiguousarray(data).view(BLOCK)
            values = (blocks["codes"].astype(np.int16) - blocks["zero_point"][..., None]).astype(np.float32)
            values *= blocks["scale"][..., None]
            rows: Float32 = values.reshape(len(data), -1)
            return rows

        return Format(name, QUANTIZATION_GROUP, BLOCK.itemsize, widen, decode)

    def tensor(self, arrays: Mapping[str, Array]) -> StoredTensor:
        """The matrix as a tensor. `arrays` are the contents of its tensors, floats as float32.

        Rows are unpacked when they are read, on any thread. Raises `ModelError` for numbers that contradict the config,
        are not finite, or that the format cannot hold.
        """
        outputs, inputs = self.shape
        codes_of, scales, zero_points = self.unpack(arrays)
        middle = 1 << (self.num_bits - 1)
        if zero_points is None:
            zero_points = np.full((1, 1), middle, np.int16)
        elif self.quantization.is_symmetric and (zero_points != middle).any():
            raise ModelError(f"{excerpt(self.name)} has zero points beside {middle}, but its config says symmetric")
        scales = np.broadcast_to(scales, (outputs, scales.shape[1]))
        zero_points = np.broadcast_to(zero_points, scales.shape)
        if not (np.abs(scales) <= MAX_SCALE).all():
            raise ModelError(f"{excerpt(self.name)} has a scale that is not finite, or makes its weights so")
        keeps_codes = self.format.decode is not None
        if keeps_codes and np.abs(scales).max(initial=0.0) > MAX_HALF:
            raise ModelError(f"{excerpt(self.name)} has a scale beyond half precision ({MAX_HALF:g})")
        groups = self._groups(arrays, scales.shape[1])
        row_bytes = inputs // self.format.block_elements * self.format.block_bytes

        def read(begin: int, num_bytes: int) -> Bytes:
            rows = slice(begin // row_bytes, (begin + num_bytes) // row_bytes)
            codes = codes_of(rows)
            if keeps_codes:
                blocks = np.empty((len(codes), inputs // QUANTIZATION_GROUP), BLOCK)
                blocks["codes"] = codes.reshape(*blocks.shape, QUANTIZATION_GROUP)
                blocks["scale"] = scales[rows][:, groups[::QUANTIZATION_GROUP]]
                blocks["zero_point"] = zero_points[rows][:, groups[::QUANTIZATION_GROUP]]
                return blocks.reshape(-1).view(np.uint8)
            if self.code_values is None:
                values = (codes.astype(np.int16) - zero_points[rows][:, groups]).astype(np.float32)
            else:
                values = self.code_values[codes]
            return np.multiply(values, scales[rows][:, groups], out=values).reshape(-1).view(np.uint8)

        return make_tensor(TensorLocation(self.name, self.format, self.shape), read)

    def _groups(self, arrays: Mapping[str, Array], num_groups: int) -> npt.NDArray[np.int64]:
        """The group of each input."""
        in_order = np.minimum(np.arange(self.shape[1]) // self.group_size, num_groups - 1)
        stored = arrays.get("g_idx", arrays.get("weight_g_idx"))
        if stored is None:
            return in_order
        groups = stored.astype(np.int64)
        if groups.min(initial=0) < 0 or groups.max(initial=0) >= num_groups:
            raise ModelError(f"{excerpt(self.name)} has a g_idx beyond its {num_groups} groups")
        if not self.quantization.has_act_order and not np.array_equal(groups, in_order):
            raise ModelError(f"{excerpt(self.name)} has inputs in act-order, which its config does not say")
        return groups


class GptqMatrix(QuantizedMatrix):
    """AutoGPTQ: words of 32 bits hold the codes of 8 inputs (of 4 with 8 bits), and zero points of as many outputs."""

    tensors: ClassVar[PartTypes] = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": INTEGERS}

    def find_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return columns, rows * (32 // self.num_bits)

    def allowed_shapes(self, outputs: int) -> dict[str, list[Shape]]:
        num_words = math.ceil(outputs * self.num_bits / 32)
        return {"qzeros": [(self.num_groups, num_words)], "scales": [(self.num_groups, outputs)]}

    def unpack(self, arrays: Mapping[str, Array]) -> UnpackedMatrix:
        words = arrays["qweight"]
        zero_points = unpack_words(arrays["qzeros"], self.num_bits).T[: self.shape[0]].astype(np.int16)  # [outputs, G]
        # AutoGPTQ stores a zero point minus 1, so that 0 becomes the largest code.
        zero_points = zero_points + self.quantization.zero_point_bias & (1 << self.num_bits) - 1
        scales = arrays["scales"].T
        return UnpackedMatrix(lambda rows: unpack_words(words[:, rows].T, self.num_bits), scales, zero_points)


class AwqMatrix(QuantizedMatrix):
    """AutoAWQ's `gemm`: words of 32 bits hold the codes and the zero points of 8 outputs, in the order `AWQ_ORDER`."""

    tensors: ClassVar[PartTypes] = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}

    def find_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return columns * 8, rows

    def allowed_shapes(self, outputs: int) -> dict[str, list[Shape]]:
        return {"qzeros": [(self.num_groups, outputs // 8)], "scales": [(self.num_groups, outputs)]}

    def unpack(self, arrays: Mapping[str, Array]) -> UnpackedMatrix:
        words = arrays["qweight"]

        def in_order(words: Array) -> Bytes:
            codes = unpack_words(words, 4)
            return codes.reshape(-1, 8)[:, AWQ_ORDER].reshape(codes.shape)

        def codes_of(rows: slice) -> Bytes:
            first = rows.start // 8  # word
            codes = in_order(words[:, first : -(-rows.stop // 8)])
            return np.ascontiguousarray(codes.T[rows.start - 8 * first : rows.stop - 8 * first])

        return UnpackedMatrix(codes_of, arrays["scales"].T, in_order(arrays["qzeros"]).T.astype(np.int16))


class PackedMatrix(QuantizedMatrix):
    """compressed-tensors' `pack-quantized`: words of 32 bits hold codes of inputs, and zero points of outputs."""

    tensors: ClassVar[PartTypes] = {
        "weight_packed": ("I32",),
        "weight_scale": FLOATS,
        "weight_shape": INTEGERS,
        "weight_zero_point": ("I32",),
        "weight_g_idx": INTEGERS,
    }

    def find_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns * (32 // self.num_bits)

    def allowed_shapes(self, outputs: int) -> dict[str, list[Shape]]:
        num_words = math.ceil(outputs * self.num_bits / 32)
        return {
            "weight_shape": [(2,)],
            "weight_scale": _row_shapes(outputs, self.num_groups),
            "weight_zero_point": [(num_words, self.num_groups)],
        }

    def unpack(self, arrays: Mapping[str, Array]) -> UnpackedMatrix:
        words, zeros = arrays["weight_packed"], arrays.get("weight_zero_point")
        if (found := arrays["weight_shape"].tolist()) != list(self.shape):
            raise ModelError(f"{excerpt(self.name)} has weight_shape {excerpt(found)}, and {list(self.shape)} codes")
        zero_points = None
        if zeros is not None:
            zero_points = unpack_words(zeros.T, self.num_bits).T[: self.shape[0]].astype(np.int16)
        return UnpackedMatrix(
            lambda rows: unpack_words(words[rows], self.num_bits), _column(arrays["weight_scale"]), zero_points
        )


class Int8Matrix(QuantizedMatrix):
    """compressed-tensors' `int-quantized`: a signed byte a weight, and signed zero points."""

    tensors: ClassVar[PartTypes] = {
        "weight": ("I8",),
        "weight_scale": FLOATS,
        "weight_zero_point": ("I8",),
        "weight_g_idx": INTEGERS,
    }

    def __init__(self, name: str, quantization: Quantization, entries: Mapping[str, TensorEntry]) -> None:
        super().__init__(name, msgspec.structs.replace(quantization, num_bits=8), entries)

    def allowed_shapes(self, outputs: int) -> dict[str, list[Shape]]:
        return dict.fromkeys(("weight_scale", "weight_zero_point"), _row_shapes(outputs, self.num_groups))

    def unpack(self, arrays: Mapping[str, Array]) -> UnpackedMatrix:
        codes, zeros = arrays["weight"], arrays.get("weight_zero_point")
        zero_points = None if zeros is None else _column(zeros).astype(np.int16) + np.int16(128)
        return UnpackedMatrix(
            lambda rows: codes[rows].view(np.uint8) ^ np.uint8(128), _column(arrays["weight_scale"]), zero_points
        )


class Fp8Matrix(QuantizedMatrix):
    """DeepSeek's FP8, and compressed-tensors' `float-quantized`: a byte in E4M3 a weight, scaled by blocks or rows."""

    tensors: ClassVar[PartTypes] = {"weight": ("F8_E4M3",), "weight_scale": FLOATS, "weight_scale_inv": FLOATS}
    code_values = E4M3_VALUES

    def allowed_shapes(self, outputs: int) -> dict[str, list[Shape]]:
        blocks = (math.ceil(outputs / self.quantization.block_rows), self.num_groups)
        return {part: [blocks, *_row_shapes(outputs, 1)] for part in SCALES}

    def find_format(self) -> Format:
        return Format("FP8", 1, 4, PLAIN_FORMATS["F32"].widen)

    def unpack(self, arrays: Mapping[str, Array]) -> UnpackedMatrix:
        (scales,) = (arrays[part] for part in SCALES if part in arrays)
        outputs, block_rows = self.shape[0], self.quantization.block_rows
        if scales.shape == (math.ceil(outputs / block_rows), self.num_groups):
            scales = scales.repeat(min(block_rows, outputs), axis=0)[:outputs]
        return UnpackedMatrix(lambda rows: arrays["weight"][rows].view(np.uint8), _column(scales))


# By the method of the folder's `quantization_config`.
LAYOUTS: dict[str, tuple[type[QuantizedMatrix], ...]] = {
    "GPTQ": (GptqMatrix,),
    "AWQ": (AwqMatrix,),
    "compressed-tensors": (PackedMatrix, Int8Matrix),
    "FP8": (Fp8Matrix,),
}


def _row_shapes(outputs: int, num_groups: int) -> list[Shape]:
    """The shapes that scales or zero points may have. With one group a row, one number may count for all rows."""
    return [(outputs, num_groups), *([(), (1,), (1, 1), (outputs,)] if num_groups == 1 else [])]


def _column(array: Array) -> Array:
    return array if array.ndim == 2 else array.reshape(-1, 1)


def unpack_words(words: Array, num_bits: int) -> Bytes:
    """Unpack 32-bit words [..., N] into codes [..., N * 32 / num_bits], the lowest bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if num_bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)

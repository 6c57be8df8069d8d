"""A quantised matrix of a folder, taken apart: codes, scales and zero points, in the order of a plain weight's rows.

A weight is (code - zero point) * scale. Which tensors hold these, and how codes are packed in words of 32 bits, differs
from tool to tool: the layouts are those of AutoGPTQ, AutoAWQ, compressed-tensors and of DeepSeek's FP8. Reads no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from brlite.checkpoint.bfloat16 import from_bfloat16
from brlite.checkpoint.quantization import ACT_ORDER, FOLDER_FORMS, ZERO_POINTS, Quantization
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

Array = npt.NDArray[np.generic]
Shape = tuple[int, ...]

FLOATS = tuple(PLAIN_FORMATS)
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "I8": "i1", "F8_E4M3": "u1"}
# Of the matrix's tensors, by the end of their names: what each may hold. The first makes a module a quantised one.
TENSORS: dict[str, dict[str, tuple[str, ...]]] = {
    "GPTQ": {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": ("I32", "I64")},
    "AWQ": {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS},
    "packed": {
        "weight_packed": ("I32",),
        "weight_scale": FLOATS,
        "weight_shape": ("I32", "I64"),
        "weight_zero_point": ("I32",),
        "weight_g_idx": ("I32", "I64"),
    },
    "int8": {"weight": ("I8",), "weight_scale": FLOATS, "weight_zero_point": ("I8",), "weight_g_idx": ("I32", "I64")},
    "FP8": {"weight": ("F8_E4M3",), "weight_scale": FLOATS, "weight_scale_inv": FLOATS},
}
OPTIONAL = ("g_idx", "weight_g_idx", "weight_zero_point")  # unless the config says that there is one
FP8_SCALES = ("weight_scale", "weight_scale_inv")  # both are multiplied by, and a matrix has one of them
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the code of each of 8 neighbours is
BLOCK = np.dtype([("codes", "u1", QUANTIZATION_GROUP), ("scale", "<f4"), ("zero_point", "<i4")])
MAX_HALF = 65504.0
MAX_SCALE = 2.0**119  # times any code, which is below 512, it is finite in single precision


def _e4m3_values() -> Float32:
    """The number of each byte: 4 bits of exponent, 3 of mantissa, no infinities (OCP 8-bit floating point)."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[codes & 127 == 127] = np.nan
    values: Float32 = np.where(codes >= 128, -magnitude, magnitude).astype(np.float32)
    return values


E4M3_VALUES = _e4m3_values()


def _widen(data: Bytes) -> Float32:
    blocks = np.ascontiguousarray(data).view(BLOCK)
    values = (blocks["codes"].astype(np.int16) - blocks["zero_point"][..., None]).astype(np.float32)
    values *= blocks["scale"][..., None]
    rows: Float32 = values.reshape(len(data), -1)
    return rows


def _decode(data: Bytes) -> Coded:
    blocks = np.ascontiguousarray(data).view(BLOCK)
    codes = np.ascontiguousarray(blocks["codes"]).reshape(len(data), -1)
    return Coded(codes, *(blocks[name].astype("<f2").view(np.uint16) for name in ("scale", "zero_point")))


def _decode_int8(data: Bytes) -> Coded:
    """Of codes whose zero point is 128."""
    codes, scales, _ = _decode(data)
    return Coded(codes ^ np.uint8(128), scales)


class QuantisedMatrix(NamedTuple):
    """What the headers say of one matrix: shapes and types of its tensors by the end of their names."""

    name: str  # of the plain weight
    kind: str  # of TENSORS
    quantization: Quantization
    shapes: Mapping[str, Shape]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.shapes[next(iter(TENSORS[self.kind]))]
        per_word = 32 // self.quantization.num_bits
        if self.kind == "GPTQ":
            return columns, rows * per_word
        if self.kind == "AWQ":
            return columns * per_word, rows
        return rows, columns * per_word if self.kind == "packed" else columns

    @property
    def group_size(self) -> int:
        return self.quantization.group_size or self.shape[1]

    @property
    def format(self) -> Format:
        """One that keeps the digits if its name is among `FOLDER_FORMS`, else plain float32."""
        if self.kind == "FP8":
            return Format("FP8", 1, 4, PLAIN_FORMATS["F32"].widen)
        quantization, num_bits = self.quantization, 8 if self.kind == "int8" else self.quantization.num_bits
        name = f"{quantization.method} {num_bits}-bit"
        name += "" if quantization.is_symmetric else ZERO_POINTS
        name += ACT_ORDER if quantization.has_act_order else ""
        if self.group_size % QUANTIZATION_GROUP or self.shape[1] % QUANTIZATION_GROUP:
            name += f" in groups of {self.group_size}"
        form = FOLDER_FORMS.get(name)
        if form is None:
            return Format(name, 1, 4, PLAIN_FORMATS["F32"].widen)
        return Format(name, QUANTIZATION_GROUP, BLOCK.itemsize, _widen, _decode_int8 if form == "int8_f16" else _decode)

    def check(self, dtypes: Mapping[str, str]) -> None:
        """Raise `ModelError` where a tensor is missing, or of another type or shape than its layout has."""
        tensors = TENSORS[self.kind]
        needed = {name for name in tensors if name not in OPTIONAL}
        if self.kind == "FP8":
            needed -= set(FP8_SCALES[1:] if FP8_SCALES[0] in dtypes else FP8_SCALES[:1])
        if not self.quantization.is_symmetric:
            needed |= {"weight_zero_point"} & tensors.keys()
        if self.quantization.has_act_order:
            needed |= {"g_idx", "weight_g_idx"} & tensors.keys()
        if missing := sorted(needed - dtypes.keys()):
            raise ModelError(f"{excerpt(self.name)} is quantised, but has no {' and no '.join(missing)}")
        if self.kind == "FP8" and set(FP8_SCALES) <= dtypes.keys():
            raise ModelError(f"{excerpt(self.name)} must have one of {' and '.join(FP8_SCALES)}")
        stored = self.shapes[next(iter(tensors))]
        if len(stored) != 2 or 0 in stored:
            raise ModelError(f"{excerpt(self.name)} must be a matrix, not of shape {excerpt(list(stored))}")
        for name, dtype in dtypes.items():
            if dtype not in tensors[name]:
                allowed = " or ".join(tensors[name])
                raise ModelError(f"{name} of {excerpt(self.name)} has dtype {excerpt(dtype)}; allowed are {allowed}")
            if self.shapes[name] not in self._allowed_shapes(name):
                wanted = " or ".join(str(list(shape)) for shape in self._allowed_shapes(name))
                found = excerpt(list(self.shapes[name]))
                raise ModelError(f"{name} of {excerpt(self.name)} has shape {found}; its layout wants {wanted}")

    def _allowed_shapes(self, name: str) -> list[Shape]:
        outputs, inputs = self.shape
        num_groups = math.ceil(inputs / self.group_size)
        per_word = 32 // self.quantization.num_bits
        if name in ("g_idx", "weight_g_idx"):
            return [(inputs,)]
        if name == "weight_shape":
            return [(2,)]
        if name == "qzeros":
            return [(num_groups, math.ceil(outputs / per_word))]
        if name == "scales":
            return [(num_groups, outputs)]
        if name == "weight_zero_point" and self.kind == "packed":
            return [(math.ceil(outputs / per_word), num_groups)]
        if name in ("weight_zero_point", *FP8_SCALES):
            whole: list[Shape] = [(), (1,), (1, 1), (outputs,), (outputs, 1)]
            if self.kind == "FP8":
                rows, columns = self.quantization.block
                return [(math.ceil(outputs / rows), math.ceil(inputs / columns)), *whole]
            return [(outputs, num_groups), *(whole if num_groups == 1 else [])]
        return [self.shapes[name]]

    def tensor(self, arrays: Mapping[str, Array], dtypes: Mapping[str, str]) -> StoredTensor:
        """The matrix, from the content of its tensors. Rows are taken apart when they are read, on any thread.

        Raises `ModelError` where numbers contradict the config, or have no form.
        """
        outputs, inputs = self.shape
        stored_as = self.format
        codes_of, scales, zero_points = self._parts(arrays, dtypes)
        scales = np.broadcast_to(scales, (outputs, scales.shape[1]))
        zero_points = np.broadcast_to(zero_points, scales.shape)
        if not (np.abs(scales) <= MAX_SCALE).all():
            raise ModelError(f"{excerpt(self.name)} has a scale that is not finite, or makes its weights so")
        groups = self._groups(arrays, scales.shape[1])

        def read_values(rows: slice) -> Float32:
            codes = codes_of(rows)
            if self.kind == "FP8":
                return E4M3_VALUES[codes] * scales[rows][:, groups]
            values = (codes.astype(np.int16) - zero_points[rows][:, groups]).astype(np.float32)
            return np.multiply(values, scales[rows][:, groups], out=values)

        def read_blocks(rows: slice) -> npt.NDArray[np.void]:
            codes = codes_of(rows)
            blocks = np.empty((len(codes), inputs // QUANTIZATION_GROUP), BLOCK)
            blocks["codes"] = codes.reshape(*blocks.shape, QUANTIZATION_GROUP)
            blocks["scale"] = scales[rows][:, groups[::QUANTIZATION_GROUP]]
            blocks["zero_point"] = zero_points[rows][:, groups[::QUANTIZATION_GROUP]]
            return blocks

        keeps_digits = stored_as.decode is not None
        if keeps_digits and np.abs(scales).max(initial=0.0) > MAX_HALF:
            raise ModelError(f"{excerpt(self.name)} has a scale beyond half precision ({MAX_HALF:g})")
        row_bytes = inputs // stored_as.block_elements * stored_as.block_bytes

        def read(begin: int, num_bytes: int) -> Bytes:
            rows = slice(begin // row_bytes, (begin + num_bytes) // row_bytes)
            content = read_blocks(rows) if keeps_digits else read_values(rows)
            return content.reshape(-1).view(np.uint8)

        return make_tensor(TensorLocation(self.name, stored_as, self.shape, 0), read)

    def _parts(
        self, arrays: Mapping[str, Array], dtypes: Mapping[str, str]
    ) -> tuple[Callable[[slice], Bytes], Float32, npt.NDArray[np.int16]]:
        """How to get the codes of some rows; scales [outputs or 1, G], and zero points that fit them."""
        quantization, num_bits = self.quantization, self.quantization.num_bits
        outputs, _ = self.shape
        main = arrays[next(iter(TENSORS[self.kind]))]
        scale_name = next(name for name in ("scales", "weight_scale", "weight_scale_inv") if name in arrays)
        scales = widen_plain(arrays[scale_name], dtypes[scale_name])
        zero_points: npt.NDArray[np.int16]
        middle: npt.NDArray[np.int16] = np.full((1, 1), 128 if self.kind == "int8" else 1 << (num_bits - 1), np.int16)
        if self.kind == "GPTQ":
            zero_points = unpack_words(arrays["qzeros"], num_bits).T[:outputs].astype(np.int16)  # [outputs, G]
            # A zero point of 0 is stored as -1, of which only the lowest bits are left.
            zero_points = zero_points + quantization.zero_point_bias & (1 << num_bits) - 1
            if quantization.is_symmetric and (zero_points != middle).any():
                raise ModelError(f"{excerpt(self.name)} has zero points beside {middle[0, 0]}, but the config says sym")
            return lambda rows: unpack_words(main[:, rows].T, num_bits), scales.T, zero_points
        if self.kind == "AWQ":
            zero_points = _unpack_awq(arrays["qzeros"]).T.astype(np.int16)

            def awq_codes(rows: slice) -> Bytes:
                first = rows.start // 8  # word
                codes = _unpack_awq(main[:, first : -(-rows.stop // 8)])
                return np.ascontiguousarray(codes.T[rows.start - 8 * first : rows.stop - 8 * first])

            return awq_codes, scales.T, zero_points
        if self.kind == "FP8":
            if scales.shape == self._allowed_shapes(scale_name)[0]:
                scales = scales.repeat(min(quantization.block[0], outputs), axis=0)[:outputs]
            else:
                scales = scales.reshape(-1, 1)
            return lambda rows: main[rows].view(np.uint8), scales, middle
        scales = scales if scales.ndim == 2 else scales.reshape(-1, 1)
        zero_points = middle
        stored_zeros = arrays.get("weight_zero_point")
        if self.kind == "packed":
            if (found := arrays["weight_shape"].tolist()) != list(self.shape):
                raise ModelError(
                    f"{excerpt(self.name)} has weight_shape {excerpt(found)}, and {list(self.shape)} codes"
                )
            if stored_zeros is not None:
                zero_points = unpack_words(stored_zeros.T, num_bits).T[:outputs].astype(np.int16)
        elif stored_zeros is not None:
            stored_zeros = stored_zeros if stored_zeros.ndim == 2 else stored_zeros.reshape(-1, 1)
            zero_points = stored_zeros.astype(np.int16) + middle
        if quantization.is_symmetric and (zero_points != middle).any():
            raise ModelError(f"{excerpt(self.name)} has zero points, but the config says symmetric")
        if self.kind == "packed":
            return lambda rows: unpack_words(main[rows], num_bits), scales, zero_points
        return lambda rows: main[rows].view(np.uint8) ^ np.uint8(128), scales, zero_points

    def _groups(self, arrays: Mapping[str, Array], num_groups: int) -> npt.NDArray[np.int64]:
        """The group of each input."""
        group_size = self.quantization.block[1] if self.kind == "FP8" else self.group_size
        in_order = np.minimum(np.arange(self.shape[1]) // group_size, num_groups - 1)
        stored = arrays.get("g_idx", arrays.get("weight_g_idx"))
        if stored is None:
            return in_order
        groups = stored.astype(np.int64)
        if groups.min(initial=0) < 0 or groups.max(initial=0) >= num_groups:
            raise ModelError(f"{excerpt(self.name)} has a g_idx beyond its {num_groups} groups")
        if not self.quantization.has_act_order and not np.array_equal(groups, in_order):
            raise ModelError(f"{excerpt(self.name)} has inputs in act-order, which its config does not say")
        return groups


def num_rounded(scales: Array, dtype: str) -> int:
    """How many of a matrix's scales half precision does not hold exactly."""
    values = widen_plain(scales, dtype)
    with np.errstate(over="ignore"):
        return int((values.astype(np.float16).astype(np.float32) != values).sum())


def widen_plain(array: Array, dtype: str) -> Float32:
    return from_bfloat16(array.view(np.uint16)) if dtype == "BF16" else array.astype(np.float32)


def unpack_words(words: Array, num_bits: int) -> Bytes:
    """The codes of words of 32 bits along the last dimension, lowest bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if num_bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def _unpack_awq(words: Array) -> Bytes:
    codes = unpack_words(words, 4)
    return codes.reshape(-1, 8)[:, AWQ_ORDER].reshape(codes.shape)

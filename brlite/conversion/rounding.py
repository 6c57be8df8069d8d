"""Measures how much int8 changes a model's matrices, by packing and unpacking a few rows of each with the kernels."""

from __future__ import annotations

import ctypes

import msgspec
import numpy as np

from brlite.backends.native.abi import INT8, LANES
from brlite.backends.native.layout import padded
from brlite.checkpoint.stored_tensor import Float32


class Rounding(msgspec.Struct, frozen=True):
    """The largest error of a weight, relative to the largest weight of its row, and the smallest cosine between a
    matrix's outputs before and after rounding, for random activations. Both over all rows that were sampled."""

    max_error: float
    min_cosine: float


def sample_rounding(library: ctypes.CDLL, rows: Float32, worst: Rounding | None) -> Rounding:
    """Measure the first `rows` [R, H] of a matrix. Returns, of each figure, the worse of this one and `worst`."""
    num_rows, num_inputs = rows.shape
    panel = np.zeros(library.brlite_packed_bytes(INT8, num_rows, num_inputs), np.uint8)
    library.brlite_pack(INT8, rows.ctypes.data, 0, num_rows, num_inputs, panel.ctypes.data)
    unpacked = np.zeros((num_rows, padded(num_inputs)), np.float32)
    for row in range(num_rows):
        library.brlite_unpack_row(INT8, panel.ctypes.data, row, num_inputs, unpacked[row].ctypes.data)
    rounded = unpacked[:, :num_inputs]

    peaks = np.maximum(np.abs(rows).max(axis=1), np.finfo(np.float32).tiny)
    error = float((np.abs(rounded - rows).max(axis=1) / peaks).max())
    activations = np.random.default_rng(0).standard_normal((num_inputs, LANES), np.float32)
    before, after = rows @ activations, rounded @ activations
    lengths = float(np.linalg.norm(before) * np.linalg.norm(after))
    cosine = float((before * after).sum()) / lengths if lengths > 0 else 1.0
    if worst is None:
        return Rounding(error, cosine)
    return Rounding(max(error, worst.max_error), min(cosine, worst.min_cosine))

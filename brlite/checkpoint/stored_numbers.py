"""Numbers as a file stores them, read into float32 arrays a piece at a time. Knows no formats and no torch.

Files are read, not mapped: the touched pages of a mapping count as this process's memory, and a file that is cut short
under a mapping ends the process, where a read can be refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BufferedReader

import numpy as np
import numpy.typing as npt

from brlite.errors import ModelError
from brlite.precision import from_bfloat16

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 17  # widened at once: what lies beside the result stays in the cache, 3 times as fast


def read_bytes(stream: BufferedReader, begin: int, num_bytes: int) -> Bytes:
    """`num_bytes` of the file from byte `begin`. Raises `ModelError` where the file ends before them."""
    data = np.empty(num_bytes, np.uint8)
    stream.seek(begin)
    num_read = stream.readinto(data.data)
    if num_read != num_bytes:
        raise ModelError(f"{stream.name}: ends at byte {begin + num_read}, and had more when it was opened")
    return data


def read_float32(stream: BufferedReader, begin: int, shape: tuple[int, ...], dtype: str) -> Float32:
    """The array whose numbers start at byte `begin`, stored as F32, F16 or BF16; nothing is rounded."""
    item_bytes, widen = STORED[dtype]
    out = np.empty(math.prod(shape), np.float32)
    for start in range(0, len(out), CHUNK_ELEMENTS):
        piece = out[start : start + CHUNK_ELEMENTS]
        piece[:] = widen(read_bytes(stream, begin + start * item_bytes, len(piece) * item_bytes))
    return out.reshape(shape)


def read_columns(stream: BufferedReader, begin: int, shape: tuple[int, ...], dtype: str, columns: range) -> Float32:
    """The same of a matrix, but for other columns than these, which are read and not kept."""
    item_bytes, widen = STORED[dtype]
    num_rows, row_size = shape
    out = np.empty((num_rows, len(columns)), np.float32)
    step = max(1, CHUNK_ELEMENTS // row_size)
    for start in range(0, num_rows, step):
        piece = out[start : start + step]
        data = read_bytes(stream, begin + start * row_size * item_bytes, len(piece) * row_size * item_bytes)
        piece[:] = widen(data).reshape(-1, row_size)[:, columns.start : columns.stop]
    return out


def _widen_f32(data: Bytes) -> Float32:
    return data.view("<f4")


def _widen_f16(data: Bytes) -> Float32:
    return data.view("<f2").astype(np.float32)


def _widen_bf16(data: Bytes) -> Float32:
    return from_bfloat16(data.view("<u2"))


# Type → bytes a number takes, and how it becomes float32.
STORED: dict[str, tuple[int, Callable[[Bytes], Float32]]] = {
    "F32": (4, _widen_f32),
    "F16": (2, _widen_f16),
    "BF16": (2, _widen_bf16),
}

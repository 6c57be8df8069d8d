"""The header of a safetensors file, checked against the file before any data is read.

The format's own library checks too, but says neither which file nor how many bytes are missing. Knows no arrays.
"""

from __future__ import annotations

import json
import math
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from brlite.checkpoint.model_file import check_model_file
from brlite.checkpoint.stored_tensor import ALLOWED_DTYPES
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

# Some 30,000 tensors a file. JSON may take 22 times its size in memory, and the format's own limit is 100 MB.
MAX_HEADER_BYTES = 4 * 2**20
LENGTH_BYTES = 8
MAX_SIZE = 2**48  # of a dimension and of a file: a product of larger ones takes longer than reading the file
MAX_DIMENSIONS = 8
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "F8_E4M3": 1}  # of one number


class TensorEntry(NamedTuple):
    """One tensor's place, `begin` to `end` in bytes, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsHeader(NamedTuple):
    """Every tensor in the order of the data, which starts at byte `data_start`."""

    entries: list[TensorEntry]
    data_start: int


def read_safetensors_header(file: Path) -> SafetensorsHeader:
    """Read a header whose tensors fill the file to its last byte. Raises `ModelError` otherwise.

    Tensors may be of any type that a quantised matrix has, too.
    """
    check_model_file(file, "safetensors")
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        present = file_bytes - LENGTH_BYTES
        if present < 0 or length > present:
            raise ModelError(
                f"{file}: truncated or not safetensors: a header of {length} bytes, a file of {file_bytes}"
            )
        if length > MAX_HEADER_BYTES:
            raise ModelError(
                f"{file}: has a header of {length} bytes (allowed: {MAX_HEADER_BYTES}); save it in several shards"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: the header is not JSON: {reason(error)}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file}: the header must be a JSON object, got {excerpt(header)}")

    entries = [_entry(file, name, value) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=attrgetter("begin", "end"))  # an empty tensor begins where the next one does
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise ModelError(f"{file}: {excerpt(entry.name)} starts at byte {entry.begin} of the data, not {position}")
        position = entry.end
    data_start = LENGTH_BYTES + len(raw)
    if data_start + position != file_bytes:
        raise ModelError(f"{file}: must be {data_start + position} bytes long by its header, but has {file_bytes}")
    return SafetensorsHeader(entries, data_start)


def _entry(file: Path, name: str, value: object) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ModelError(f"{file}: {excerpt(name)} must have dtype, shape and data_offsets, got {excerpt(value)}")
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"{file}: {excerpt(name)} has dtype {excerpt(dtype)}; allowed are {ALLOWED_DTYPES}")
    are_sizes = all(type(length) is int and 0 <= length <= MAX_SIZE for length in (*shape[:MAX_DIMENSIONS], begin, end))
    if not are_sizes or len(shape) > MAX_DIMENSIONS:
        raise ModelError(f"{file}: {excerpt(name)} has the impossible shape {excerpt(shape)} at byte {excerpt(begin)}")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != num_bytes:
        raise ModelError(f"{file}: {excerpt(name)} takes {num_bytes} bytes by its shape, {end - begin} by its offsets")
    return TensorEntry(name, dtype, tuple(shape), begin, end)

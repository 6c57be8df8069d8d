"""Reads safetensors (github.com/huggingface/safetensors), one file or several shards, with numpy alone.

A header is checked against its file's size. The format's own library also checks headers, but its errors name neither
file nor missing bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from brlite.checkpoint.checkpoint import weights_identity
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.model_file import check_model_file
from brlite.checkpoint.stored_tensor import ALLOWED_DTYPES, PLAIN_FORMATS, LocatedTensors, TensorLocation
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

# Enough for some 30,000 tensors. Parsed JSON may take 22 times its size; the format's own limit is 100 MB.
MAX_HEADER_BYTES = 4 * 2**20
LENGTH_BYTES = 8
MAX_SIZE = 2**48  # of a dimension and of a file: multiplying larger ones would take longer than reading the file
MAX_DIMENSIONS = 8
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "F8_E4M3": 1}  # of one number


class TensorEntry(NamedTuple):
    """One tensor: bytes `begin` to `end` of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


class SafetensorsHeader(NamedTuple):
    """Every tensor in the order of the data, their bytes in all, and the content of the file before the data."""

    entries: list[TensorEntry]
    num_bytes: int
    raw: bytes


class SafetensorsCheckpoint(LocatedTensors):
    """Implements `Checkpoint`. Opening it checks all headers."""

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        headers = read_headers(files)
        for file, header in headers.items():
            for entry in header.entries:
                if entry.dtype not in PLAIN_FORMATS:
                    found = f"{excerpt(entry.name)} has dtype {excerpt(entry.dtype)}"
                    raise ModelError(f"{file}: {found}; allowed are {ALLOWED_DTYPES}")
        super().__init__(
            {
                file: [
                    TensorLocation(name, PLAIN_FORMATS[dtype], shape, begin)
                    for name, dtype, shape, _, begin, _ in entries
                ]
                for file, (entries, _, _) in headers.items()
            }
        )
        self.identity = weights_identity(self.config, {file: header.raw for file, header in headers.items()})


def read_headers(files: Sequence[Path]) -> dict[Path, SafetensorsHeader]:
    """The headers of a model's shards. Raises `ModelError` for a broken one, and where two hold the same tensor."""
    headers: dict[Path, SafetensorsHeader] = {}
    names: set[str] = set()
    for file in files:
        headers[file] = read_safetensors_header(file)
        for entry in headers[file].entries:
            if entry.name in names:
                raise ModelError(f"{file}: holds {excerpt(entry.name)}, which an earlier shard holds too")
            names.add(entry.name)
    return headers


def read_safetensors_header(file: Path) -> SafetensorsHeader:
    """Read a header. Its tensors must fill the file to the last byte; otherwise raises `ModelError`.

    `DTYPE_BYTES` lists the allowed types. Some of them are only for the tensors of quantized matrices.
    """
    check_model_file(file, "safetensors")
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
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

    start = position = LENGTH_BYTES + len(raw)
    entries = [_entry(file, start, name, value) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=attrgetter("begin", "end"))  # an empty tensor begins where the next one does
    for entry in entries:
        if entry.begin != position:
            found = f"byte {entry.begin - start} of the data, not {position - start}"
            raise ModelError(f"{file}: {excerpt(entry.name)} starts at {found}")
        position = entry.end
    if position != file_bytes:
        raise ModelError(f"{file}: must be {position} bytes long by its header, but has {file_bytes}")
    return SafetensorsHeader(entries, position - start, prefix + raw)


def _entry(file: Path, data_start: int, name: str, value: object) -> TensorEntry:
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
    return TensorEntry(name, dtype, tuple(shape), file, data_start + begin, data_start + end)

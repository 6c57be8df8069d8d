"""Writes a packed file while weights are packed, so that weights may be larger than memory.

The bytes equal those of `packed_file.write_packed_file`. Only for precisions that round weights, not for those that
keep a file's codes. Each thread has only the rows in memory that it packs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from brlite.backends.native.abi import LANES
from brlite.backends.native.layout import Layout, PackedTensor
from brlite.backends.native.packed_file import CHUNK_BYTES, PackedFileKey, packed_file_header, weights_start
from brlite.backends.native.packer import pack_in_pieces, pack_rows, read_vector
from brlite.checkpoint.stored_tensor import StoredTensor
from brlite.files.new_file import FileRecord, NewFile, read_record
from brlite.models.families.family import WeightTarget


class Packing(NamedTuple):
    """How a model's weights are packed. `key` gets its identity only after packing."""

    library: ctypes.CDLL
    layout: Layout
    key: PackedFileKey


class PackedFileWriter:
    """Writes a packed file to `path`. Raises `OSError` if the disk fails.

    Leaving the `with` statement without `finish` removes the file.
    """

    def __init__(self, path: Path, packing: Packing, pool: ThreadPoolExecutor, on_bytes: Callable[[int], None]) -> None:
        self._library, self._layout, self._key = packing
        self._pool = pool
        self._on_bytes = on_bytes
        self._start = weights_start(self._key)
        self._file = NewFile(path, self._start + self._key.num_bytes)

    def __enter__(self) -> PackedFileWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            pass

    def put(self, target: WeightTarget, tensor: StoredTensor) -> None:
        """Pack `tensor` as the rows of the parameter that `target` names, rounded to the parameter's type."""
        (packed,) = self._layout.tensors[target.parameter]
        if packed.form == "vector":
            self._write(packed.offset + 4 * target.start, read_vector(packed, tensor))
        else:
            pack_in_pieces(self._pool, partial(self._put_rows, packed), target.start, tensor)

    def finish(self, identity: str) -> FileRecord:
        """Write the header after all weights and publish the file. `identity` must be as long as the key's."""

        def checksum(first: int) -> int:
            content = self._file.read(min(CHUNK_BYTES, self._key.num_bytes - first), self._start + first)
            data = np.frombuffer(content, np.uint8)
            return int(self._library.brlite_checksum(None, data.ctypes.data, len(data)))

        sums = list(self._pool.map(checksum, range(0, self._key.num_bytes, CHUNK_BYTES)))
        header = packed_file_header(msgspec.structs.replace(self._key, identity=identity), sums)
        if len(header) != self._start:
            raise ValueError(f"the header has {len(header)} bytes, not the {self._start} that were planned")
        self._file.write(header, 0)
        synced = self._pool.submit(self._file.sync)
        record = read_record(self._file.temporary)
        synced.result()
        self._file.publish()
        return record

    def _put_rows(self, packed: PackedTensor, first: int, tensor: StoredTensor) -> None:
        unit = LANES if packed.form == "panels" else 1  # rows that lie together
        unit_bytes = packed.num_bytes // -(-packed.num_outputs // unit)
        first_unit, last = first // unit, first + tensor.shape[0]
        units = np.zeros((-(-last // unit) - first_unit, unit_bytes), np.uint8)
        begin = packed.offset + first_unit * unit_bytes
        # The first and last panel may already contain rows of another tensor.
        for index in {0, len(units) - 1} if first % unit or last % unit else ():
            there = self._file.read(unit_bytes, self._start + begin + index * unit_bytes)
            units[index] = np.frombuffer(there, np.uint8)
        pack_rows(self._library, packed, units, first % unit, tensor)
        self._write(begin, units)

    def _write(self, offset: int, values: npt.NDArray[Any]) -> None:
        data = values.reshape(-1).view(np.uint8).data
        self._file.write(data, self._start + offset)
        self._on_bytes(len(data))

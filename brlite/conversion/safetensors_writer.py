"""Writes safetensors files (github.com/huggingface/safetensors), one shard after another, in the order of the tensors.

A file begins with its header, so its tensors are planned before any is written. A shard gets its name once it is
completely on the disk. Its sha256 is computed while it is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from brlite.checkpoint.safetensors import LENGTH_BYTES
from brlite.checkpoint.stored_tensor import PLAIN_FORMATS, Float32, to_bfloat16
from brlite.files.new_file import Buffer, FileRecord, NewFile

CHUNK_ELEMENTS = 1 << 18
OnBytes = Callable[[int], None]  # called with the number of bytes just written


class PlannedTensor(NamedTuple):
    """A tensor to be written; `dtype` is F32 or BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * PLAIN_FORMATS[self.dtype].block_bytes


class PlannedShard(NamedTuple):
    """A file and the tensors to be written to it, in their order."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        return len(shard_header(self.tensors)) + sum(tensor.num_bytes for tensor in self.tensors)


def plan_shards(tensors: list[PlannedTensor], max_bytes: int) -> list[PlannedShard]:
    """Divide the tensors, in their order, into files of at most `max_bytes`. A larger tensor gets its own file."""
    groups: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    names = (f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups)))
    return [PlannedShard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def shard_header(tensors: tuple[PlannedTensor, ...]) -> bytes:
    """The bytes before the data: the length of a JSON object, then the object, with the place of each tensor."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def shard_index(shards: list[PlannedShard]) -> Mapping[str, object]:
    """The content of `model.safetensors.index.json`."""
    tensors = [(tensor, shard.file_name) for shard in shards for tensor in shard.tensors]
    total = sum(tensor.num_bytes for tensor, _ in tensors)
    return {"metadata": {"total_size": total}, "weight_map": {tensor.name: name for tensor, name in tensors}}


class ShardWriter:
    """Writes one shard. A thread of its own rounds, hashes and writes, while the caller reads the next tensor.

    Leaving the `with` statement before `finish` removes what was written. Raises `OSError` if the disk fails.
    """

    def __init__(self, folder: Path, shard: PlannedShard, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._file = NewFile(folder / shard.file_name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="brlite-write")
        self._written = self._thread.submit(self._write, shard_header(shard.tensors))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            self._thread.shutdown(cancel_futures=True)

    def put(self, tensor: PlannedTensor, values: Float32) -> None:
        """Start to write the next tensor. `values` must not change until `wait` returns."""

        def write() -> None:
            flat = values.reshape(-1)
            for start in range(0, len(flat), CHUNK_ELEMENTS):
                chunk = flat[start : start + CHUNK_ELEMENTS]
                stored = to_bfloat16(chunk) if tensor.dtype == "BF16" else chunk
                self._write(stored.view(np.uint8).data)

        self.wait()
        self._written = self._thread.submit(write)

    def wait(self) -> None:
        """Wait until every tensor is written; the system may still hold it in its page cache."""
        self._written.result()

    def finish(self) -> FileRecord:
        """Wait until the whole file is on the disk, then give it its name."""
        self.wait()
        self._file.publish()
        return FileRecord(num_bytes=self._num_bytes, sha256=self._digest.hexdigest())

    def _write(self, data: Buffer) -> None:
        self._digest.update(data)
        self._file.write(data, self._num_bytes)
        self._num_bytes += len(data)
        self._on_bytes(len(data))

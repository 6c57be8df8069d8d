"""Loads packed weights: maps a matching packed file, else packs the checkpoint's tensors and writes a packed file."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from brlite.backends.native.abi import INT4_MIN
from brlite.backends.native.layout import BLOCK_FORMATS, CODED_FORMATS, FORMATS, Layout, PackedTensor, packed_layout
from brlite.backends.native.memory import NativeMemory
from brlite.backends.native.nodes import place_weights
from brlite.backends.native.packed_file import (
    MappedPackedFile,
    PackedFileError,
    PackedFileKey,
    checksums,
    write_packed_file,
)
from brlite.checkpoint.load_plan import NATIVE_FORMS, LoadPlan, held_parameters, matrix_parts, placed_tensors
from brlite.checkpoint.stored_tensor import Bytes, Float32, StoredTensor, from_bfloat16, to_bfloat16
from brlite.errors import ModelError
from brlite.files.ownership import why_untrusted
from brlite.files.temporary import sweep
from brlite.models.families.family import WeightTarget
from brlite.models.precision import WEIGHTS_NAMES

logger = logging.getLogger(__name__)

T = TypeVar("T")
Importance = Mapping[str, Float32]  # matrix → how much the square of an error counts, by its input [num_inputs]

LAYOUT_VERSION = 4  # raised by every change that packs the same weights into other bytes
MAX_HALF = 65504  # of half precision, which the scale and the minimum of 32 weights in 4 bits have
ROWS_AT_A_TIME = 256  # rows that one call reads, widens and packs; whole panels


class PackedWeights:
    """Weights as the kernels read them. Owns their memory until `close`. `content_hash` is of their checksums."""

    def __init__(self, layout: Layout, memory: NativeMemory | MappedPackedFile, sums: list[int]) -> None:
        self.layout = layout
        self.content_hash = hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()
        self._memory = memory

    def address(self, name: str) -> int:
        """The address of a parameter that has one part."""
        (tensor,) = self.layout.tensors[name]
        return self.part_address(tensor)

    def part_address(self, part: PackedTensor) -> int:
        return self._memory.address + part.offset

    def place(self) -> None:
        """Move the weights to the memory of the nodes that compute with them: see `place_weights`."""
        place_weights(self._memory.address, self.layout.num_bytes)

    def close(self) -> None:
        """Release the memory. May be called twice."""
        self._memory.close()


class PackingThreads(ThreadPoolExecutor):
    """A pool whose running calls end before the `with` block is left, also by an exception. Queued calls are dropped.

    The calls write to memory that is released after the block. `Thread.join` cannot be relied on for that: in Python
    before 3.13 a join that Ctrl-C interrupts takes the thread for ended (github.com/python/cpython/issues/90882).
    """

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads, thread_name_prefix="brlite-pack")
        self._running: set[threading.Lock] = set()  # one for each running call, held while it runs
        self._is_ending = False

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(self._run, work, *args, **kwargs)

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Return when no call runs. An exception of a signal handler is raised after that, not before."""
        interrupt: BaseException | None = None
        while True:
            try:
                self._is_ending = True
                for is_running in list(self._running):
                    with is_running:
                        pass
                self.shutdown(wait=True, cancel_futures=True)
            except BaseException as error:
                interrupt = error
            else:
                break
        if interrupt is not None:
            raise interrupt

    def _run(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        is_running = threading.Lock()
        with is_running:
            self._running.add(is_running)  # before the look at `_is_ending`: `end` waits for it, or it ends here
            try:
                if self._is_ending:
                    raise CancelledError
                return work(*args, **kwargs)
            finally:
                self._running.discard(is_running)


class Packer:
    """Fills memory with a decoder's weights, tensor by tensor, on the threads of `pool`.

    `importance` is of matrices that are rounded to 4 bits. That is quicker without it.
    """

    def __init__(self, library: ctypes.CDLL, layout: Layout, memory: NativeMemory, pool: ThreadPoolExecutor) -> None:
        self._library = library
        self._layout = layout
        self._bytes = memory.bytes()
        self._pool = pool
        self.importance: Importance = {}

    def put(self, target: WeightTarget, tensor: StoredTensor) -> None:
        """Read `tensor` and pack it as the rows of the parameter that `target` names, rounded to its type."""
        parts, num_rows = self._layout.tensors[target.parameter], target.shape[0]
        packed = next(part for part in reversed(parts) if part.first_row <= target.start)
        start, out = target.start - packed.first_row, self._bytes[packed.offset : packed.offset + packed.num_bytes]
        if packed.form == "vector":
            out.view(np.float32)[start : start + num_rows] = read_vector(packed, tensor)
            return
        importance = self.importance.get(target.parameter)
        pack = partial(pack_rows, self._library, packed, out, importance=importance)
        if num_rows <= ROWS_AT_A_TIME:
            pack(start, tensor)
        else:
            pack_in_pieces(self._pool, pack, start, tensor)


def pack_in_pieces(
    pool: ThreadPoolExecutor, pack: Callable[[int, StoredTensor], None], start: int, tensor: StoredTensor
) -> None:
    """Call `pack` for pieces of `tensor` on the threads of `pool`, each with its first row, counted from `start`.

    Pieces begin at multiples of whole panels, so that no two threads write to one panel.
    """
    stop = start + tensor.shape[0]
    bounds = [start, *range((start // ROWS_AT_A_TIME + 1) * ROWS_AT_A_TIME, stop, ROWS_AT_A_TIME), stop]
    waiting = [
        pool.submit(pack, first, tensor.part(range(first - start, last - start))) for first, last in pairwise(bounds)
    ]
    for done in waiting:
        done.result()


def pack_rows(
    library: ctypes.CDLL,
    packed: PackedTensor,
    out: Bytes,
    first: int,
    tensor: StoredTensor,
    importance: Float32 | None = None,
) -> None:
    """Read `tensor` and pack it as the rows from `first` on of `out`, which is a matrix or whole panels of it."""
    place = first, tensor.shape[0], packed.num_inputs, out.ctypes.data
    form = NATIVE_FORMS.get(tensor.format.name)
    if packed.form == "table":
        rows = out.view(np.uint16).reshape(-1, packed.num_inputs)
        rows[first : first + tensor.shape[0]] = to_bfloat16(tensor.float32(), keeps_subnormal=False)
    elif packed.format in BLOCK_FORMATS:
        blocks = tensor.blocks()
        library.brlite_pack_blocks(packed.format, blocks.ctypes.data, *place)
    elif packed.format in CODED_FORMATS and form is not None and FORMATS[form] == packed.format:
        codes, scales, offsets = tensor.coded()
        offsets_address = None if offsets is None else offsets.ctypes.data
        library.brlite_pack_codes(packed.format, codes.ctypes.data, scales.ctypes.data, offsets_address, *place)
    elif packed.format == INT4_MIN:
        values = tensor.float32()
        if (largest := max(float(values.max()), -float(values.min()))) > MAX_HALF:
            found = f"{tensor.name} has a weight of {largest:.6g}; a_bf16_w_int4 holds weights up to {MAX_HALF}"
            raise ModelError(f"{found}: choose another precision")
        library.brlite_pack_int4(values.ctypes.data, None if importance is None else importance.ctypes.data, *place)
    else:
        values = tensor.float32()
        library.brlite_pack(packed.format, values.ctypes.data, *place)


def read_vector(packed: PackedTensor, tensor: StoredTensor) -> Float32:
    """The numbers of a vector: those of a bias rounded to bfloat16."""
    values = tensor.float32()
    return from_bfloat16(to_bfloat16(values, keeps_subnormal=False)) if packed.is_rounded else values


def load_weights(
    library: ctypes.CDLL, plan: LoadPlan, measure: Callable[[PackedWeights], Importance] | None = None
) -> PackedWeights:
    """Load the weights of the plan's checkpoint, or of its shard, in the plan's precision.

    `measure` finds, with these weights, how much inputs matter. The matrices that it names are packed again by that.
    """
    model, shard = plan.model, plan.shard
    layout = packed_layout(library, held_parameters(model, shard), matrix_parts(model, shard))
    part = f" {shard.rank} of {shard.size}" if shard else ""
    weights_name = WEIGHTS_NAMES[model.precision.weights]
    key = PackedFileKey(LAYOUT_VERSION, weights_name, plan.checkpoint.identity + part, layout.num_bytes)
    file = None if plan.packed_file is None else _trusted(plan.packed_file, plan.checkpoint.path)
    if file is not None:
        sweep(file.parent, file.name)
        mapped, file = _map_packed_file(library, plan, file, key)
        if mapped is not None:
            return PackedWeights(layout, mapped, mapped.checksums)
    memory = NativeMemory(library, layout.num_bytes, "the weights")
    try:
        # Its threads end before the memory that they write to is released.
        with PackingThreads(plan.num_threads) as pool:
            packer = Packer(library, layout, memory, pool)
            for target, tensor in placed_tensors(plan):
                packer.put(target, tensor)
            if measure is not None and (importance := measure(PackedWeights(layout, memory, []))):
                packer.importance = importance
                for target, tensor in placed_tensors(plan, "rounding to 4 bits"):
                    if target.parameter in importance:
                        packer.put(target, tensor)
            sums = checksums(library, memory.address, memory.num_bytes, pool)
        if file is not None:
            try:
                write_packed_file(file, key, memory, sums)
                logger.info("packed weights are kept in %s (%d MB)", file, memory.num_bytes // 10**6)
            except OSError as error:
                logger.warning("%s: the packed weights cannot be saved: %s", file, error.strerror)
    except BaseException:
        memory.close()
        raise
    return PackedWeights(layout, memory, sums)


def _map_packed_file(
    library: ctypes.CDLL, plan: LoadPlan, file: Path, key: PackedFileKey
) -> tuple[MappedPackedFile | None, Path | None]:
    """The packed file if it can be used; else None, and the path to write it to, None if it must not be written."""
    try:
        with PackingThreads(plan.num_threads) as pool:
            mapped = MappedPackedFile(file, key, library, pool, plan.report)
    except FileNotFoundError:
        logger.debug("%s: there is no packed file yet", file)
        return None, file
    except PackedFileError as error:
        logger.warning("%s is not used: %s%s", file, error, "; it is made anew" if error.is_ours else "")
        return None, file if error.is_ours else None
    if _trusted(file, plan.checkpoint.path, mapped.status) is None:
        mapped.close()
        return None, None
    return mapped, file


def _trusted(file: Path, model: Path, opened: os.stat_result | None = None) -> Path | None:
    """`file`, or None if another user could have written it; then it is neither read nor written.

    Packed weights in the model's own folder are trusted like the model. `opened` is that of `why_untrusted`.
    """
    if file.parent == model:
        return file
    try:
        place = file if opened is not None or file.exists() else file.parent
        stranger = why_untrusted(place, opened) if file.parent.exists() else None
    except OSError:
        return file  # reading or writing it will report the error
    if stranger:
        logger.warning("%s is not used, since another user could have written it: %s", file, stranger)
        return None
    return file

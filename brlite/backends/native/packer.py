"""The packed weights of a decoder: in memory that is filled tensor by tensor, or in an image that is mapped."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from brlite.backends.native.layout import Layout, PackedTensor
from brlite.backends.native.memory import NativeMemory
from brlite.backends.native.packed_file import MappedPackedFile
from brlite.models.families.family import WeightTarget
from brlite.precision import from_bfloat16, to_bfloat16

Float32 = npt.NDArray[np.float32]

ROWS_AT_A_TIME = 1024  # packed by one thread in one call


class PackedWeights:
    """Weights as the kernels read them. Owns the memory they lie in from its making to `close`."""

    def __init__(self, layout: Layout, memory: NativeMemory | MappedPackedFile) -> None:
        self.layout = layout
        self._memory = memory

    def address(self, name: str) -> int:
        return self._memory.address + self.layout.tensors[name].offset

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        self._memory.close()


class Packer:
    """Fills memory with a decoder's weights, tensor by tensor, on the threads of `pool`."""

    def __init__(self, library: ctypes.CDLL, layout: Layout, memory: NativeMemory, pool: ThreadPoolExecutor) -> None:
        self._library = library
        self._layout = layout
        self._memory = memory
        self._pool = pool

    def put(self, target: WeightTarget, values: Float32) -> None:
        """Pack `values` as the rows of a parameter that `target` names, rounded to its type."""
        tensor, start = self._layout.tensors[target.parameter], target.start
        if tensor.form == "panels":
            self._pack(tensor, start, values)
        elif tensor.form == "table":
            rows = self._memory.bytes(tensor.offset, tensor.num_bytes).view(np.uint16).reshape(-1, tensor.num_inputs)
            rows[start : start + len(values)] = to_bfloat16(values, keeps_subnormal=False)
        else:
            vector = self._memory.floats(tensor.offset, tensor.num_inputs)
            vector[start : start + len(values)] = rounded_vector(target, values)

    def _pack(self, tensor: PackedTensor, start: int, values: Float32) -> None:
        values = np.ascontiguousarray(values, np.float32)
        panels = self._memory.address + tensor.offset

        def pack(first: int) -> None:
            rows = values[first : first + ROWS_AT_A_TIME]
            self._library.brlite_pack(
                tensor.format, rows.ctypes.data, start + first, len(rows), tensor.num_inputs, panels
            )

        for done in [self._pool.submit(pack, first) for first in range(0, len(values), ROWS_AT_A_TIME)]:
            done.result()


def rounded_vector(target: WeightTarget, values: Float32) -> Float32:
    """A norm as it is; a bias rounded to bfloat16, but held in float32."""
    if target.dtype == "float32":
        return values
    return from_bfloat16(to_bfloat16(values, keeps_subnormal=False))

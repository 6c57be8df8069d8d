"""Buffers of float rows between operations: a rank's own, and those that all ranks of a plan share.

Ranks share the rows that an operation reads as a whole. Each rank maps the same unnamed file, which the system removes
with the last rank.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from typing import NamedTuple

import numpy as np

from brlite.backends.native import abi
from brlite.backends.native.layout import padded
from brlite.backends.native.memory import NativeMemory, aligned
from brlite.checkpoint.placing import LoadPlan
from brlite.errors import ConfigError


class Rows(NamedTuple):
    """Rows at `address`. `row_size` is their stride in floats: the row's length padded to whole groups."""

    address: int
    row_size: int

    @property
    def as_input(self) -> dict[str, int]:
        return {"input": self.address, "row_size": self.row_size}

    @property
    def as_output(self) -> dict[str, int]:
        return {"output": self.address, "row_size": self.row_size}

    def column(self, index: int) -> Rows:
        """The same rows, starting at column `index`."""
        return Rows(self.address + 4 * index, self.row_size)


def max_rows(plan: LoadPlan) -> int:
    """The maximum number of rows of a step."""
    return max(plan.engine.step_tokens(), plan.spec.build_batch)


class SharedSizes(NamedTuple):
    """Lengths of the shared rows: residual stream, output of attention, hidden layer of the MLP, logits."""

    max_rows: int
    hidden: int
    attended: int
    product: int
    logits: int

    @classmethod
    def of(cls, plan: LoadPlan) -> SharedSizes:
        config = plan.config
        return cls(max_rows(plan), config.hidden_size, config.q_size, config.intermediate_size, config.vocab_size)

    def num_bytes(self) -> dict[str, int]:
        """Bytes of each buffer, in their order in memory."""
        rows = {"hidden": self.max_rows, "attended": self.max_rows, "product": self.max_rows, "logits": abi.HEAD_ROWS}
        return {name: _num_bytes(num_rows, getattr(self, name)) for name, num_rows in rows.items()}


class SharedRows:
    """One rank's mapping of the shared rows, until `close`. `meeting` is the address of the ranks' barrier."""

    def __init__(self, library: ctypes.CDLL, sizes: SharedSizes, file: int) -> None:
        self._library = library
        self._mapping = mmap.mmap(file, shared_bytes(library, sizes))
        self.meeting = int(np.frombuffer(self._mapping, np.uint8).ctypes.data)
        address = self.meeting + aligned(int(library.brlite_meeting_bytes()))
        found: dict[str, Rows] = {}
        for name, num_bytes in sizes.num_bytes().items():
            found[name] = Rows(address, padded(getattr(sizes, name)))
            address += num_bytes
        self.hidden, self.attended, self.product, self.logits = found.values()

    def end_meeting(self) -> None:
        """End all waiting, after a rank was lost. Any thread may call it until `close`."""
        self._library.brlite_end_meeting(self.meeting)

    def close(self) -> None:
        """May be called twice."""
        self._mapping.close()


class OwnRows:
    """Rows of this process alone.

    One more vector follows the last row: SILU reads it if the intermediate size is not a multiple of 32.
    """

    def __init__(self, library: ctypes.CDLL, num_rows: int, size: int) -> None:
        self._memory = NativeMemory(library, _num_bytes(num_rows, size), "memory for a step")
        self.rows = Rows(self._memory.address, padded(size))

    def close(self) -> None:
        self._memory.close()


def create_shared_file(library: ctypes.CDLL, sizes: SharedSizes) -> int:
    """An unnamed file that ranks share. Returns a descriptor that the caller closes."""
    num_bytes = shared_bytes(library, sizes)
    if hasattr(os, "memfd_create"):  # Linux: a container's /dev/shm may be too small for it
        file = os.memfd_create("brlite-ranks")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    try:
        # Allocated now: writing to a page that the system cannot provide would kill the process (SIGBUS).
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        os.close(file)
        raise ConfigError(f"ranks share {num_bytes / 2**20:.0f} MiB of memory: {error.strerror}") from error
    return file


def shared_bytes(library: ctypes.CDLL, sizes: SharedSizes) -> int:
    """Bytes of the shared memory."""
    return aligned(int(library.brlite_meeting_bytes())) + sum(sizes.num_bytes().values())


def _num_bytes(num_rows: int, size: int) -> int:
    return aligned(4 * (num_rows * padded(size) + abi.LANES))

"""The rows of floats that operations hand to each other: a rank's own, and those that the ranks of a plan share.

Ranks share what an operation reads whole. Each maps the same file, which has no name and goes with the last of them.
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
from brlite.errors import ConfigError
from brlite.models.config import ModelConfig


class Rows(NamedTuple):
    """Rows at an address, `row_size` floats apart: as many as a row has, filled up with zeros to whole groups."""

    address: int
    row_size: int

    @property
    def as_input(self) -> dict[str, int]:
        return {"input": self.address, "row_size": self.row_size}

    @property
    def as_output(self) -> dict[str, int]:
        return {"output": self.address, "row_size": self.row_size}

    def column(self, index: int) -> Rows:
        """The same rows from a column onwards."""
        return Rows(self.address + 4 * index, self.row_size)


class SharedSizes(NamedTuple):
    """How large the rows are that ranks share: the residual stream, what heads have seen, the MLP's inside, logits."""

    max_rows: int
    hidden: int
    attended: int
    product: int
    logits: int

    @classmethod
    def of(cls, config: ModelConfig, max_rows: int) -> SharedSizes:
        return cls(max_rows, config.hidden_size, config.q_size, config.intermediate_size, config.vocab_size)

    def num_bytes(self) -> dict[str, int]:
        """Of each, in the order in which they lie."""
        rows = {"hidden": self.max_rows, "attended": self.max_rows, "product": self.max_rows, "logits": abi.HEAD_ROWS}
        return {name: _num_bytes(num_rows, getattr(self, name)) for name, num_rows in rows.items()}


class SharedRows:
    """One rank's view of what all share, from its making to `close`. `meeting` is where they wait for each other."""

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
        """End all waiting: a rank is gone. Any thread may call it, until `close`."""
        self._library.brlite_end_meeting(self.meeting)

    def close(self) -> None:
        """May be called twice."""
        self._mapping.close()


class OwnRows:
    """Rows of this process alone.

    One vector more lies behind the last row: SILU reads so far where the intermediate size is no multiple of 32.
    """

    def __init__(self, library: ctypes.CDLL, num_rows: int, size: int) -> None:
        self._memory = NativeMemory(library, _num_bytes(num_rows, size), "memory for a step")
        self.rows = Rows(self._memory.address, padded(size))

    def close(self) -> None:
        self._memory.close()


def create_shared_file(library: ctypes.CDLL, sizes: SharedSizes) -> int:
    """A file without a name, for ranks to share: a descriptor that the caller closes."""
    num_bytes = shared_bytes(library, sizes)
    if hasattr(os, "memfd_create"):  # Linux: a container's /dev/shm may be too small for it
        file = os.memfd_create("brlite-ranks")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    try:
        # Taken now: a page that is not there when it is written to ends a process without a word.
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        os.close(file)
        raise ConfigError(f"ranks share {num_bytes / 2**20:.0f} MiB of memory: {error.strerror}") from error
    return file


def shared_bytes(library: ctypes.CDLL, sizes: SharedSizes) -> int:
    """All that ranks share."""
    return aligned(int(library.brlite_meeting_bytes())) + sum(sizes.num_bytes().values())


def _num_bytes(num_rows: int, size: int) -> int:
    return aligned(4 * (num_rows * padded(size) + abi.LANES))

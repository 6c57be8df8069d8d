"""Buffers of float rows between operations: a rank's own, and those that all ranks of a plan share.

Ranks share the rows that an operation reads as a whole. Each rank maps the same unnamed file, which the system removes
with the last rank.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from brlite.backends.native import abi
from brlite.backends.native.layout import padded
from brlite.backends.native.memory import NativeMemory, aligned
from brlite.checkpoint.load_plan import LoadPlan
from brlite.errors import ConfigError
from brlite.process.machine import show_bytes


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


def shared_sizes(plan: LoadPlan) -> list[tuple[int, int]]:
    """The number of the shared rows and their length: residual stream, output of attention, hidden layer of the MLP,
    logits. In their order in memory."""
    config, num_rows = plan.config, max_rows(plan)
    lengths = (config.hidden_size, config.q_size, config.intermediate_size)
    return [*((num_rows, length) for length in lengths), (abi.HEAD_ROWS, config.vocab_size)]


class SharedRows:
    """A rank's mapping of the rows that the ranks of a plan share, until `close`. Connects it with the other ranks.

    `meeting` is the address of the ranks' barrier.
    """

    def __init__(self, library: ctypes.CDLL, plan: LoadPlan, file: int) -> None:
        self._library = library
        self._mapping = mmap.mmap(file, shared_bytes(library, plan))
        self.meeting = int(np.frombuffer(self._mapping, np.uint8).ctypes.data)
        address = self.meeting + aligned(int(library.brlite_meeting_bytes()))
        found: list[Rows] = []
        for num_rows, length in shared_sizes(plan):
            found.append(Rows(address, padded(length)))
            address += _num_bytes(num_rows, length)
        self.hidden, self.attended, self.product, self.logits = found

    def open(self, host: str) -> str:
        return ""

    def join(self, place: str) -> None:
        """Nothing to do: ranks wait for each other in memory that is already mapped."""

    def abort(self) -> None:
        """End all waiting, after a rank was lost. Any thread may call it until `close`."""
        self._library.brlite_end_meeting(self.meeting)

    def close(self) -> None:
        """May be called twice."""
        self._mapping.close()


class StepBuffers:
    """The buffers between operations, until `close`. With `shared` rows some of them are those.

    One more vector follows the last row of each: SILU reads it if the intermediate size is not a multiple of 32.
    """

    def __init__(self, library: ctypes.CDLL, plan: LoadPlan, shared: SharedRows | None) -> None:
        self.shared = shared
        config, num_rows = plan.rank_config, max_rows(plan)
        with ExitStack() as opened:

            def allocate(num_rows: int, length: int) -> Rows:
                memory = NativeMemory(library, _num_bytes(num_rows, length), "memory for a step")
                opened.callback(memory.close)
                return Rows(memory.address, padded(length))

            self.qkv = allocate(num_rows, config.q_size + 2 * config.kv_size)
            self.gate_up = allocate(num_rows, 2 * config.intermediate_size)
            self.hidden = shared.hidden if shared else allocate(num_rows, config.hidden_size)
            self.attended = shared.attended if shared else allocate(num_rows, config.q_size)
            self.logits = shared.logits if shared else allocate(abi.HEAD_ROWS, config.vocab_size)
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()


def create_shared_file(library: ctypes.CDLL, plan: LoadPlan) -> int:
    """An unnamed file that the ranks of a plan share. Returns a descriptor that the caller closes."""
    num_bytes = shared_bytes(library, plan)
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
        raise ConfigError(f"ranks share {show_bytes(num_bytes)} of memory: {error.strerror}") from error
    return file


def shared_bytes(library: ctypes.CDLL, plan: LoadPlan) -> int:
    """Bytes of the shared memory."""
    return aligned(int(library.brlite_meeting_bytes())) + sum(_num_bytes(*size) for size in shared_sizes(plan))


def _num_bytes(num_rows: int, size: int) -> int:
    return aligned(4 * (num_rows * padded(size) + abi.LANES))

"""Memory of the native library, in huge pages where the system has them, as numpy arrays of bytes."""

from __future__ import annotations

import ctypes
import logging
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from brlite.errors import ConfigError
from brlite.process.machine import find_memory, show_bytes

logger = logging.getLogger(__name__)

Size = TypeVar("Size", int, npt.NDArray[np.int64])

ALIGNMENT = 4096  # bytes: a page of memory, where each tensor begins in memory and in files


def aligned(num_bytes: Size) -> Size:
    """Rounded up to a multiple of `ALIGNMENT`; for an array, each number."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class NativeMemory:
    """`num_bytes` zeroed bytes at `address`, until `close`. Raises `ConfigError` if the system refuses them.

    Linux does not refuse what is more than the free memory; it ends a process later, when the bytes are used. So that
    is a warning.
    """

    def __init__(self, library: ctypes.CDLL, num_bytes: int, purpose: str) -> None:
        self._library = library
        self.num_bytes = num_bytes
        if num_bytes > (memory := find_memory()).available:
            limit = f" within {memory.decided_by}" if memory.decided_by else ""
            needed, free = show_bytes(num_bytes), show_bytes(memory.available)
            logger.warning("%s: %s, but %s are free%s; the system may end this process", purpose, needed, free, limit)
        self.address: int = library.brlite_allocate(max(1, num_bytes)) or 0
        if not self.address:
            raise ConfigError(f"{purpose} takes {show_bytes(num_bytes)}, which is not there")

    def bytes(self) -> npt.NDArray[np.uint8]:
        """A view of the memory; not to be used after `close`."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.num_bytes).from_address(self.address))

    def close(self) -> None:
        """Release the memory. May be called twice."""
        if self.address:
            self._library.brlite_release(self.address, max(1, self.num_bytes))
            self.address = 0

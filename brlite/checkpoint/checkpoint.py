"""What every format looks like from outside: a config and named arrays, in Hugging Face's names and layout.

Knows no format and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ALLOWED_DTYPES = "F32, F16 and BF16"


class Checkpoint(Protocol):
    """An opened model folder or file. Its headers have been checked against the sizes of its files."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`; for GGUF the metadata in the same keys."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data on disk."""
        ...

    @property
    def identity(self) -> str:
        """Names these weights: as long as the files and the config are the same, and no longer. Reads no data."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name. Reads no tensor data."""
        ...

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Every tensor once, widened to float32, contiguous and writable.

        None of them is kept: memory is what the caller holds plus one tensor.
        """
        ...

    def close(self) -> None:
        """Let go of files and mappings. Nothing is called afterwards."""
        ...

"""Reads model folders and files: safetensors, `.bin`, GGUF; fetches them by name. One tensor in memory at a time.

Knows no network layers and no requests. May import: models (its config), config, errors; numpy, gguf, torch.
Importing this package imports none of the three: `open_checkpoint` loads the reader that a path turns out to need, and
only the one for `.bin` needs torch.
"""

from __future__ import annotations

from pathlib import Path

from brlite.checkpoint.checkpoint import Checkpoint
from brlite.checkpoint.folder import find_weights

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder or a `.gguf` file, reading headers only. Raises `ModelError` if it is missing or broken."""
    weights = find_weights(path)
    if weights.kind == "safetensors":
        from brlite.checkpoint.safetensors_checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path, weights.files)
    if weights.kind == "bin":
        from brlite.checkpoint.bin_checkpoint import BinCheckpoint

        return BinCheckpoint(path, weights.files)
    from brlite.checkpoint.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(weights.files[0])

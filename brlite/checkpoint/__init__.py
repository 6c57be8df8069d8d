"""Reads model folders and files, one tensor at a time; fetches them by name.

Formats are safetensors (quantized or not), `.bin`, GGUF, traced `.pt` and bundles.

Importing this package imports no reader: `open_checkpoint` loads the one that a path needs. Only the one for
`.bin` needs torch. First file: `checkpoint.py`.
"""

from __future__ import annotations

from pathlib import Path

from brlite.checkpoint.checkpoint import Checkpoint
from brlite.checkpoint.folder import find_weights, has_weights, read_config
from brlite.errors import MissingExtra, ModelError
from brlite.files.cache import expand_home
from brlite.files.quoting import one_line, reason

__all__ = ["Checkpoint", "open_checkpoint"]

TRACED_SUFFIX = ".pt"


def open_checkpoint(path: Path, model_file: str = "") -> Checkpoint:
    """Open a model folder or a `.gguf` file, reading headers only. Raises `ModelError` if it is missing or broken.

    Where a folder has no weights of its own, they come from `model_file`, if that is a traced `.pt`.
    """
    if model_file.endswith(TRACED_SUFFIX) and path.is_dir() and not has_weights(path):
        from brlite.checkpoint.traced_checkpoint import TracedCheckpoint

        try:
            file = expand_home(model_file)
        except OSError as error:
            raise ModelError(f"model_file {one_line(model_file)}: {reason(error)}") from None
        return TracedCheckpoint(file, path)
    from brlite.checkpoint.bundle import BundleCheckpoint, is_bundle

    if is_bundle(path):
        return BundleCheckpoint(path)
    weights = find_weights(path)
    if weights.kind == "safetensors":
        from brlite.models.families.hf_config import QUANTIZATION_KEY

        if (config := read_config(path)).get(QUANTIZATION_KEY) is not None:
            from brlite.checkpoint.quantized_checkpoint import QuantizedCheckpoint

            return QuantizedCheckpoint(path, weights.files, config)
        from brlite.checkpoint.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path, weights.files)
    if weights.kind == "bin":
        try:
            from brlite.checkpoint.bin_checkpoint import BinCheckpoint
        except (ImportError, OSError) as error:
            raise MissingExtra(f"{path}: a model in PyTorch's .bin files", "torch", error) from error
        return BinCheckpoint(path, weights.files)
    from brlite.checkpoint.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(weights.files)

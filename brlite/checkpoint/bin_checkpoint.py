"""Reads a folder of PyTorch's `.bin` files, one file or several shards. They are mapped, with `weights_only`.

The only reader that needs torch, since the format is torch's own. Runs no code from a file: anything but a dict of
tensors is refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from brlite.checkpoint.checkpoint import weights_identity
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.model_file import check_model_file
from brlite.checkpoint.stored_tensor import (
    ALLOWED_DTYPES,
    BF16,
    F16,
    F32,
    StoredTensor,
    check_unchanged,
    tensor_in_memory,
)
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason

FORMATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


class BinCheckpoint:
    """Implements `Checkpoint`. Opening it reads the table of every shard; tensors are read one at a time."""

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        self._written_ns: dict[Path, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._formats: dict[str, str] = {}
        tables: dict[Path, bytes] = {}  # instead of the header that this format lacks: names, types and shapes
        for file in files:
            check_model_file(file, "zip")  # else a file that is missing would have no error of ours
            self._written_ns[file] = file.stat().st_mtime_ns
            rows = []
            for name, tensor in load_shard(file).items():
                if name in self._shapes:
                    raise ModelError(f"{file}: holds {excerpt(name)}, which an earlier shard holds too")
                self._shapes[name] = tuple(tensor.shape)
                self._formats[name] = FORMATS[tensor.dtype].name
                rows.append((name, str(tensor.dtype), tuple(tensor.shape), tensor.stride(), tensor.storage_offset()))
            tables[file] = repr(rows).encode()
        self.identity = weights_identity(self.config, tables)
        self.num_bytes = sum(file.stat().st_size for file in files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def formats(self) -> dict[str, str]:
        return dict(self._formats)

    def tensors(self) -> Iterator[StoredTensor]:
        for file, written_ns in self._written_ns.items():
            for name, tensor in load_shard(file).items():
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                yield tensor_in_memory(name, FORMATS[tensor.dtype], tuple(tensor.shape), data)
                del data  # a copy if the tensor was not contiguous
            with file.open("rb") as stream:
                check_unchanged(stream, written_ns)


def load_shard(file: Path) -> dict[str, torch.Tensor]:
    """Map one `.bin` file. Raises `ModelError` if it is broken or holds anything else than tensors."""
    check_model_file(file, "zip")
    if not zipfile.is_zipfile(file):
        raise ModelError(f"{file}: truncated, or not a zip file as torch.save has written them since PyTorch 1.6")
    try:
        with zipfile.ZipFile(file) as archive:
            compressed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ModelError(f"{file}: not a zip file as torch.save writes it: {reason(error)}") from error
    if compressed:  # a compressed member could unpack to any size
        raise ModelError(f"{file}: {excerpt(compressed[0])} is compressed, as torch never does")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    # For a broken pickle torch's restricted reader raises nearly any type of exception.
    except Exception as error:
        raise ModelError(f"{file}: torch refuses it: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: must hold a dict of tensors, got {excerpt(type(content).__name__)}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = f"{excerpt(name)}: {excerpt(type(tensor).__name__)}"
            raise ModelError(f"{file}: must map names to tensors, got {found}")
        if tensor.layout != torch.strided or tensor.dtype not in FORMATS or tensor.device.type != "cpu":
            found = f"{tensor.layout}, {tensor.dtype}, {tensor.device}"
            raise ModelError(f"{file}: {excerpt(name)} is {found}; allowed are dense {ALLOWED_DTYPES}")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ModelError(f"{file}: {excerpt(name)} repeats its numbers: shape {excerpt(tuple(tensor.shape))}")
    return {name: tensor.detach() for name, tensor in content.items()}

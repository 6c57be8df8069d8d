"""Reads a folder of safetensors, one file or several shards, with numpy alone. Reads nothing ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brlite.checkpoint.checkpoint import weights_identity
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.safetensors_header import read_headers
from brlite.checkpoint.stored_tensor import ALLOWED_DTYPES, PLAIN_FORMATS, LocatedTensors, TensorLocation
from brlite.errors import ModelError
from brlite.files.quoting import excerpt


class SafetensorsCheckpoint(LocatedTensors):
    """Implements `Checkpoint`. Opening it checks all headers."""

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        headers = read_headers(files)
        for file, header in headers.items():
            for entry in header.entries:
                if entry.dtype not in PLAIN_FORMATS:
                    found = f"{excerpt(entry.name)} has dtype {excerpt(entry.dtype)}"
                    raise ModelError(f"{file}: {found}; allowed are {ALLOWED_DTYPES}")
        super().__init__(
            {
                file: [
                    TensorLocation(name, PLAIN_FORMATS[dtype], shape, begin)
                    for name, dtype, shape, _, begin, _ in entries
                ]
                for file, (entries, _, _) in headers.items()
            }
        )
        self.identity = weights_identity(self.config, {file: header.raw for file, header in headers.items()})

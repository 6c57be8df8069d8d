"""Which weights a checkpoint holds, told from its files' names, sizes, times and headers. Reads no tensor data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGEST_BYTES = 16


def weights_identity(config: Mapping[str, Any], headers: Mapping[Path, bytes]) -> str:
    """A short hex digest that changes with the config, any file's name, size or mtime, and any byte of its header.

    Folders do not count: a model that is moved stays itself.
    """
    files = [(file.name, *_size_and_time(file), _digest(header)) for file, header in headers.items()]
    return _digest(json.dumps([config, files], sort_keys=True).encode())


def read_header(file: Path, num_bytes: int) -> bytes:
    """The first `num_bytes` of a file."""
    with file.open("rb") as stream:
        return stream.read(num_bytes)


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()

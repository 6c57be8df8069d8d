"""Checks that a file is the one that was meant, by size and sha256."""

from __future__ import annotations

import hashlib
from pathlib import Path

from brlite.checkpoint.progress import OnProgress
from brlite.errors import ModelError

CHUNK_BYTES = 1 << 20


def check_sha256(file: Path, expected: str, on_progress: OnProgress) -> None:
    """Raise `ModelError` unless the file's sha256 is `expected`, in hexadecimal."""
    digest, done, num_bytes = hashlib.sha256(), 0, max(1, file.stat().st_size)
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            on_progress(f"checking {file.name}", done / num_bytes)
    if digest.hexdigest() != expected:
        raise ModelError(f"{file.name} has sha256 {digest.hexdigest()}, but {expected} was expected")

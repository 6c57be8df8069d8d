"""`Checkpoint`, the interface of all formats: a config and named tensors, in Hugging Face's names and layout.

`weights_identity` computes the `identity` of most formats. Has no code of any format, and needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from brlite.errors import ModelError

if TYPE_CHECKING:
    from brlite.checkpoint.stored_tensor import StoredTensor

DIGEST_BYTES = 16
NUM_SAMPLES, SAMPLE_BYTES = 64, 512  # of all files of a checkpoint together


class Checkpoint(Protocol):
    """A model folder or file. Its headers have been checked against the sizes of its files.

    No file is open except while `tensors` yields its tensors.
    """

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`; for GGUF, the metadata under the same keys."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data on disk."""
        ...

    @property
    def identity(self) -> str:
        """A digest that changes with the files or the config. Packed weights are used only for the same identity."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name. Reads no tensor data."""
        ...

    def formats(self) -> dict[str, str]:
        """The name of every tensor's `Format`: BF16, Q4_K … Reads no tensor data."""
        ...

    def tensors(self) -> Iterator[StoredTensor]:
        """Yields every tensor once, in the order of the data. Each can be read until the next one is taken."""
        ...


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the `with` block, a `ModelError` is raised again with `path` before its text."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def weights_identity(config: Mapping[str, Any], headers: Mapping[Path, bytes]) -> str:
    """A short hex digest that changes with the config, any file's name, size or mtime, and any byte of its header.

    It changes, too, with all but small changes of a file's content, of which samples are read: builds of images may
    give each file the same mtime, and fine-tuned weights have the size and the header of those before. The folder does
    not count: a model that is moved keeps its identity.
    """
    files, num_samples = [], max(2, NUM_SAMPLES // max(1, len(headers)))
    for file, header in headers.items():
        status, samples = file.stat(), b""
        with file.open("rb", buffering=0) as stream:
            for number in range(num_samples):
                stream.seek(status.st_size * number // num_samples)
                samples += stream.read(SAMPLE_BYTES)
        files.append((file.name, status.st_size, status.st_mtime_ns, _digest(header), _digest(samples)))
    return _digest(json.dumps([config, files], sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()

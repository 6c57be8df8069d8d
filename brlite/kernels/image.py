"""The packed weights as a file: what `serialize_file` names. Written once, read at every later start.

    8 bytes   magic
    4 bytes   length of the manifest, little-endian
    manifest  JSON: what the weights are and how they are laid out, a checksum for each MiB of them
    16 bytes  blake2b of the manifest
    …         zeros to a multiple of 4096, then the weights, byte for byte as in memory

The weights are read into large pages, not mapped: mapped ones come in pages of 4 KB, and a step took a tenth longer.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from brlite.kernels.memory import NativeMemory

MAGIC = b"brlite\x00\x01"
ALIGNMENT = 4096
MAX_MANIFEST_BYTES = 16 * 2**20
CHUNK_BYTES = 2**20
DIGEST_BYTES = 16


class ImageKey(msgspec.Struct, frozen=True):
    """What an image must be of to be used: layout, precision and the very checkpoint that it was made from."""

    layout_version: int
    precision: str
    identity: str
    num_bytes: int


class Manifest(msgspec.Struct, frozen=True):
    key: ImageKey
    checksums: list[int]


class ImageError(Exception):
    """Why an image cannot be used. `is_ours` tells whether it may be replaced."""

    def __init__(self, reason: str, *, is_ours: bool) -> None:
        super().__init__(reason)
        self.is_ours = is_ours


def checksums(library: ctypes.CDLL, memory: NativeMemory, pool: ThreadPoolExecutor) -> list[int]:
    """A checksum for each MiB of `memory`."""

    def checksum(start: int) -> int:
        size = min(CHUNK_BYTES, memory.num_bytes - start)
        return int(library.brlite_checksum(None, memory.address + start, size))

    return list(pool.map(checksum, range(0, memory.num_bytes, CHUNK_BYTES)))


def read_image(
    path: Path,
    key: ImageKey,
    library: ctypes.CDLL,
    memory: NativeMemory,
    pool: ThreadPoolExecutor,
    on_progress: Callable[[float], None],
) -> list[int]:
    """Fill `memory` from the image at `path`; returns its checksums. Raises `ImageError` where it is not `key`'s."""
    try:
        with path.open("rb") as file:
            manifest, start = _read_manifest(file.read(MAX_MANIFEST_BYTES))
            _check(manifest, key, path.stat().st_size - start)
            found = _read_chunks(file.fileno(), start, library, memory, pool, on_progress)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}", is_ours=False) from error
    if found != manifest.checksums:
        raise ImageError("its weights do not have their checksums", is_ours=True)
    return found


def write_image(path: Path, key: ImageKey, memory: NativeMemory, sums: list[int]) -> None:
    """Write `memory` to a temporary file beside `path` and give it that name. Raises `OSError`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(_header(Manifest(key, sums)))
            file.write(memory.bytes().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _header(manifest: Manifest) -> bytes:
    body = msgspec.json.encode(manifest)
    header = MAGIC + len(body).to_bytes(4, "little") + body + _digest(body)
    return header + bytes(-len(header) % ALIGNMENT)


def _read_manifest(head: bytes) -> tuple[Manifest, int]:
    """The manifest, and where the weights begin."""
    if not head.startswith(MAGIC):
        raise ImageError("it is not an image of brlite", is_ours=False)
    begin = len(MAGIC) + 4
    end = begin + int.from_bytes(head[len(MAGIC) : begin], "little")
    body, digest = head[begin:end], head[end : end + DIGEST_BYTES]
    if digest != _digest(body):
        raise ImageError("its manifest is damaged", is_ours=True)
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except msgspec.ValidationError as error:
        raise ImageError(f"its manifest is of another version: {error}", is_ours=True) from error
    return manifest, -(-(end + DIGEST_BYTES) // ALIGNMENT) * ALIGNMENT


def _check(manifest: Manifest, key: ImageKey, num_bytes: int) -> None:
    for name in ImageKey.__struct_fields__:
        found, wanted = getattr(manifest.key, name), getattr(key, name)
        if found != wanted:
            raise ImageError(f"its {name} is {found}, not {wanted}", is_ours=True)
    if num_bytes != key.num_bytes:
        raise ImageError(f"it holds {num_bytes} bytes of weights, not {key.num_bytes}", is_ours=True)


def _read_chunks(
    file: int,
    start: int,
    library: ctypes.CDLL,
    memory: NativeMemory,
    pool: ThreadPoolExecutor,
    on_progress: Callable[[float], None],
) -> list[int]:
    def read(offset: int) -> int:
        size = min(CHUNK_BYTES, memory.num_bytes - offset)
        num_read = os.preadv(file, [memory.bytes(offset, size).data], start + offset)
        if num_read != size:
            raise ImageError("it ends too early", is_ours=True)
        return int(library.brlite_checksum(None, memory.address + offset, size))

    return list(_reporting(pool.map(read, range(0, memory.num_bytes, CHUNK_BYTES)), memory.num_bytes, on_progress))


def _reporting(sums: Iterator[int], num_bytes: int, on_progress: Callable[[float], None]) -> Iterator[int]:
    for number, checksum in enumerate(sums, start=1):
        on_progress(min(1.0, number * CHUNK_BYTES / max(1, num_bytes)))
        yield checksum


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

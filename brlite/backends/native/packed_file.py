"""The packed weights as a file: what `serialize_file` names. Written once, read at every later start.

    8 bytes   magic
    4 bytes   length of the manifest, little-endian
    manifest  JSON: what the weights are and how they are laid out, a checksum for each MiB of them; then spaces, so
              that its length follows from the weights' size alone
    16 bytes  blake2b of the manifest
    …         zeros to a multiple of 4096, then the weights, byte for byte as in memory

The weights are mapped, not read, so several servers share one copy. Steps are as fast as with huge pages.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from brlite.backends.native.memory import NativeMemory, aligned
from brlite.checkpoint.model_file import describe_file
from brlite.files.new_file import NewFile
from brlite.files.ownership import forbid_others_to_write
from brlite.files.quoting import MAX_EXCERPT, one_line

MAGIC = b"brlite\x00\x01"
MAX_MANIFEST_BYTES = 16 * 2**20
CHUNK_BYTES = 2**20
DIGEST_BYTES = 16
CHECKSUM_CHARACTERS = 21  # a 64-bit number and a comma in JSON


class PackedFileKey(msgspec.Struct, frozen=True):
    """A packed file is used only if its key is equal: layout, precision and the checkpoint that it was made from."""

    layout_version: int
    precision: str
    identity: str
    num_bytes: int


class PackedManifest(msgspec.Struct, frozen=True):
    key: PackedFileKey
    checksums: list[int]


class PackedFileError(Exception):
    """Why a packed file cannot be used. `is_ours` tells whether it may be replaced."""

    def __init__(self, reason: str, *, is_ours: bool) -> None:
        super().__init__(reason)
        self.is_ours = is_ours


def checksums(
    library: ctypes.CDLL,
    address: int,
    num_bytes: int,
    pool: ThreadPoolExecutor,
    on_fraction: Callable[[float], None] | None = None,
) -> list[int]:
    """A checksum for each MiB at `address`. `on_fraction` is called with the fraction that is done."""

    def checksum(start: int) -> int:
        return int(library.brlite_checksum(None, address + start, min(CHUNK_BYTES, num_bytes - start)))

    sums = []
    for checked in pool.map(checksum, range(0, num_bytes, CHUNK_BYTES)):
        sums.append(checked)
        if on_fraction is not None:
            on_fraction(min(1.0, len(sums) * CHUNK_BYTES / num_bytes))
    return sums


class MappedPackedFile:
    """The weights of a packed file: `num_bytes` at `address` until `close`, their `checksums`, the file's `status`.

    Raises `FileNotFoundError` if there is no file, `PackedFileError` if it is damaged or has another key.
    """

    def __init__(
        self,
        path: Path,
        key: PackedFileKey,
        library: ctypes.CDLL,
        pool: ThreadPoolExecutor,
        on_fraction: Callable[[float], None] | None = None,
    ) -> None:
        self.num_bytes = key.num_bytes
        try:
            if path.exists() and (described := describe_file(path, "packed weights")):
                raise PackedFileError(f"it {described}", is_ours=False)
            with path.open("rb") as file:
                manifest, start = _read_manifest(file.read(MAX_MANIFEST_BYTES))
                for name in PackedFileKey.__struct_fields__:
                    found, wanted = getattr(manifest.key, name), getattr(key, name)
                    if found != wanted:
                        raise PackedFileError(
                            f"its {name} is {one_line(found, MAX_EXCERPT)}, not {wanted}", is_ours=True
                        )
                self.status = os.fstat(file.fileno())
                if (num_bytes := self.status.st_size - start) != key.num_bytes:
                    raise PackedFileError(f"it holds {num_bytes} bytes of weights, not {key.num_bytes}", is_ours=True)
                # From its beginning: an offset must be a multiple of a page, which has 64 KiB on some Arm kernels.
                self._mapping = mmap.mmap(file.fileno(), start + key.num_bytes, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise PackedFileError(f"cannot be read: {error.strerror}", is_ours=False) from error
        self.address = int(np.frombuffer(self._mapping, np.uint8).ctypes.data) + start
        self.checksums = checksums(library, self.address, key.num_bytes, pool, on_fraction)
        if self.checksums != manifest.checksums:
            self.close()
            raise PackedFileError("its weights do not have their checksums", is_ours=True)

    def close(self) -> None:
        """Unmap. May be called twice."""
        self._mapping.close()


def write_packed_file(path: Path, key: PackedFileKey, memory: NativeMemory, sums: list[int]) -> None:
    """Write `memory` to a temporary file beside `path`, then rename it to `path`. Raises `OSError`."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    header = packed_file_header(key, sums)
    with NewFile(path) as new:
        new.write(header, 0)
        new.write(memory.bytes().data, len(header))
        forbid_others_to_write(new.temporary)  # else the next start does not trust it
        new.publish()


def read_packed_file_key(path: Path) -> PackedFileKey:
    """The key in the header of a packed file. Raises `PackedFileError` where that is not one, and `OSError`."""
    with path.open("rb") as file:
        return _read_manifest(file.read(MAX_MANIFEST_BYTES))[0].key


def packed_file_header(key: PackedFileKey, sums: list[int]) -> bytes:
    """The bytes before the weights."""
    body = msgspec.json.encode(PackedManifest(key, sums)).ljust(_manifest_bytes(key))
    header = MAGIC + len(body).to_bytes(4, "little") + body + _digest(body)
    return header.ljust(aligned(len(header)), b"\0")


def weights_start(key: PackedFileKey) -> int:
    """The offset of the weights in the file. Does not depend on the checksums."""
    header_bytes = len(MAGIC) + 4 + _manifest_bytes(key) + DIGEST_BYTES
    return aligned(header_bytes)


def _manifest_bytes(key: PackedFileKey) -> int:
    num_checksums = -(-key.num_bytes // CHUNK_BYTES)
    return len(msgspec.json.encode(PackedManifest(key, []))) + CHECKSUM_CHARACTERS * num_checksums


def _read_manifest(head: bytes) -> tuple[PackedManifest, int]:
    """The manifest, and the offset of the weights."""
    if not head.startswith(MAGIC):
        raise PackedFileError("it is not a packed file of brlite", is_ours=False)
    begin = len(MAGIC) + 4
    end = begin + int.from_bytes(head[len(MAGIC) : begin], "little")
    body, digest = head[begin:end], head[end : end + DIGEST_BYTES]
    if digest != _digest(body):
        raise PackedFileError("its manifest is damaged", is_ours=True)
    try:
        manifest = msgspec.json.decode(body, type=PackedManifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PackedFileError(f"its manifest is of another version: {error}", is_ours=True) from error
    return manifest, aligned(end + DIGEST_BYTES)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

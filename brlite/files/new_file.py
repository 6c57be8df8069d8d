"""Writes files that appear complete or not at all: under a temporary name, then synced to the disk and renamed.

All functions raise `OSError` if the disk fails.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import msgspec

from brlite.files.temporary import create_temporary, sweep

CHUNK_BYTES = 2**20
FLUSH_BYTES = 64 * 2**20

Buffer = bytes | memoryview


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The size and hash of a file's content."""

    num_bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class NewFile:
    """A file under a temporary name, at first `num_bytes` zeros. Written bytes are flushed to the disk as they come.

    Any thread may write. Leaving the `with` statement before `publish` removes what was written. So does the end of the
    process while a daemon thread is in it, as where a server is stopped while it loads a model.
    """

    def __init__(self, file: Path, num_bytes: int = 0) -> None:
        self._file = file
        sweep(file.parent, file.name)
        self._handle, self.temporary = create_temporary(file)
        self._remove = weakref.finalize(self, _remove, self.temporary, os.getpid())
        self._lock = threading.Lock()
        self._num_unflushed = 0
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="brlite-flush")
        self._flushed: Future[None] | None = None
        try:
            os.ftruncate(self._handle, num_bytes)
        except OSError:
            self.__exit__()
            raise

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flusher.shutdown()
        os.close(self._handle)
        self._remove()

    def write(self, data: Buffer, position: int) -> None:
        num_bytes = write_at(self._handle, data, position)
        # Without flushes the system would keep gigabytes until the end, and the disk would idle until then.
        with self._lock:
            self._num_unflushed += num_bytes
            if self._num_unflushed < FLUSH_BYTES or not (self._flushed is None or self._flushed.done()):
                return
            self._num_unflushed = 0
            if self._flushed is not None:
                self._flushed.result()
            self._flushed = self._flusher.submit(os.fdatasync, self._handle)

    def read(self, num_bytes: int, position: int) -> bytes:
        return os.pread(self._handle, num_bytes, position)

    def sync(self) -> None:
        """Wait until all bytes are on the disk."""
        if self._flushed is not None:
            self._flushed.result()
        os.fsync(self._handle)

    def publish(self) -> None:
        """Wait until all bytes are on the disk, then give the file its name, in place of a file that has it."""
        self.sync()
        self.temporary.replace(self._file)


def _remove(file: Path, pid: int) -> None:
    """Remove a file of the process `pid`. In a forked child, which inherits its finalizers, does nothing."""
    if os.getpid() == pid:
        file.unlink(missing_ok=True)


def write_at(handle: int, data: Buffer, position: int) -> int:
    """Write all of `data` from byte `position` of an open file on. Returns the number of bytes."""
    left = memoryview(data).cast("B")
    num_bytes = len(left)
    while left:
        num_written = os.pwrite(handle, left, position)
        left, position = left[num_written:], position + num_written
    return num_bytes


def write_whole(file: Path, content: bytes) -> FileRecord:
    """Write `content` to `file`, in place of a file that is there."""
    with NewFile(file) as new:
        new.write(content, 0)
        new.publish()
    return record_of(content)


def record_of(content: bytes) -> FileRecord:
    return FileRecord(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def read_record(file: Path) -> FileRecord:
    """Read a file, and return its size and hash."""
    digest, total = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while num_read := stream.readinto(buffer):
            digest.update(buffer[:num_read])
            total += num_read
    return FileRecord(num_bytes=total, sha256=digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Make the names of new files survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

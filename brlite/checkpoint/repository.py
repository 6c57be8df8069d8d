"""One repository in a hub's cache folder, in the layout of Hugging Face's library, which other programs read too.

`blobs/HASH` are the contents of files, `snapshots/COMMIT/` has links to them under the files' names, and
`refs/REVISION` holds the commit of a branch. Links are made last, so that an interrupted download shows no model.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from brlite.checkpoint.progress import folder_bytes
from brlite.errors import ModelError
from brlite.files.new_file import write_whole
from brlite.files.quoting import one_line, reason
from brlite.process.machine import show_bytes

FOLDER_PREFIX = "models--"
PART_SUFFIX = ".brlite-part"
PART_SUFFIXES = (PART_SUFFIX, ".incomplete")  # the second is of Hugging Face's library
COUNTS_SUFFIX = ".counts"  # of the file beside a part that counts the bytes of each segment
MAIN = "main"
CHOICES = "brlite-choices"


class Repository:
    """A model's folder in a cache. Creates no file or folder until something is written."""

    def __init__(self, cache: Path, name: str) -> None:
        self.name = name
        self.folder = cache / f"{FOLDER_PREFIX}{name.replace('/', '--')}"
        self._lock_file = cache / ".locks" / self.folder.name / "brlite.lock"

    def blob(self, key: str) -> Path:
        """The path of the content with this hash, which need not exist yet."""
        return self.folder / "blobs" / key

    def snapshot(self, revision: str | None) -> Path | None:
        """The folder of a commit, or of a branch's commit when it was last fetched; None if it is not here."""
        revision = revision or MAIN
        snapshots = self.folder / "snapshots"
        try:
            commit = (self.folder / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            commit = revision
        is_name = bool(commit) and Path(commit).name == commit
        return snapshots / commit if is_name and (snapshots / commit).is_dir() else None

    def snapshots(self) -> list[Path]:
        """The folders of all commits that are here, the newest first."""
        folder = self.folder / "snapshots"
        found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)

    def publish(self, commit: str, revision: str | None, keys: Mapping[str, str]) -> Path:
        """Make the links of `keys`, file name → hash, in the commit's folder. Returns the folder."""
        folder = self.folder / "snapshots" / commit
        for name, key in keys.items():
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(self.blob(key), link.parent)
            if link.is_symlink() and os.readlink(link) == target:
                continue
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        if revision != commit:
            _write(self.folder / "refs" / (revision or MAIN), commit)
        return folder

    def choice(self, revision: str | None) -> str | None:
        """The GGUF file that a name without a quantization means, as `set_choice` has stored it; None if it has not."""
        try:
            return (self.folder / CHOICES / (revision or MAIN)).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def set_choice(self, revision: str | None, file_name: str) -> None:
        _write(self.folder / CHOICES / (revision or MAIN), file_name)

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the repository's lock. Calls `on_wait` first if another thread or process holds it."""
        from filelock import FileLock, Timeout

        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock_file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def check_space(self, num_bytes: int, variable: str) -> None:
        """Raise `ModelError` if the disk has less than `num_bytes` free; `variable` is the one that sets the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if num_bytes > free:
            raise ModelError(
                f"{show_bytes(num_bytes)} are needed at {self.folder.parent}, where {show_bytes(free)} are free; "
                f"{variable} chooses another folder, `brlite models rm NAME` makes room"
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def num_bytes(self) -> int:
        """The bytes that the repository takes on the disk, with the parts of an interrupted download."""
        return folder_bytes(self.folder)

    def has_parts(self) -> bool:
        """Whether a download was interrupted, or is under way."""
        for part in (path for suffix in PART_SUFFIXES for path in (self.folder / "blobs").glob(f"*{suffix}")):
            with suppress(FileNotFoundError):  # it has got its name since it was listed
                if part.stat().st_size:
                    return True
        return False

    def remove(self) -> None:
        """Remove it. Raises `ModelError` if the system refuses, or while another process downloads it."""

        def busy() -> None:
            raise ModelError(f"{self.name} is being downloaded by another process")

        with self.locked(busy):
            try:
                shutil.rmtree(self.folder)
            except OSError as error:
                raise ModelError(f"{self.folder}: {reason(error)}") from error

    def remove_file(self, snapshot: Path, name: str) -> None:
        """Remove one file of a snapshot, if it is there, and its content unless another snapshot has a link to it."""
        link = snapshot / name
        blob = link.resolve()
        link.unlink(missing_ok=True)
        others = (path for folder in self.snapshots() for path in folder.rglob("*") if path.is_symlink())
        if all(path.resolve() != blob for path in others):
            blob.unlink(missing_ok=True)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode())


def cached_repositories(cache: Path) -> list[Repository]:
    """The repositories in a cache folder, by name."""
    if not cache.is_dir():
        return []
    names = sorted(path.name for path in cache.iterdir() if path.name.startswith(FOLDER_PREFIX) and path.is_dir())
    return [Repository(cache, one_line(name.removeprefix(FOLDER_PREFIX).replace("--", "/", 1))) for name in names]

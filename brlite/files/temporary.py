"""Temporary files and folders. After a crash the next start removes those whose process is gone.

Each is locked while its process works on it; the system releases the lock when the process ends in any way. The name
has a random part and the file must be new, so that nothing is written through another user's link.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing swept
    fcntl = None  # type: ignore[assignment]

PART_SUFFIX = ".part"
# What `sweep` may remove. Other programs have such names too: a browser's download is `model.gguf.part`.
OWN_NAME = re.compile(rf"(.*)\.[0-9a-f]{{8}}{re.escape(PART_SUFFIX)}", re.DOTALL)
MAX_NAME_BYTES = 255 - len(".01234567") - len(PART_SUFFIX)
NO_LINK: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # the second: bytes unchanged on Windows


def create_temporary(target: Path) -> tuple[int, Path]:
    """Make an empty file beside `target`, under the umask. Returns its descriptor, whose closing ends the lock."""
    while True:
        path = target.with_name(f"{_cut(target.name)}.{secrets.token_hex(4)}{PART_SUFFIX}")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
        _lock(handle)
        if os.fstat(handle).st_nlink:  # else `sweep` removed it before it was locked
            return handle, path
        os.close(handle)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder that only this user can read, removed at the end. Removes those that killed processes have left."""
    sweep(parent, name)
    handle = None
    while True:
        path = parent / f"{name}.{secrets.token_hex(4)}{PART_SUFFIX}"
        path.mkdir(mode=0o700)
        if fcntl is None:
            break
        with suppress(FileNotFoundError):  # `sweep` removed it before it was locked
            handle = os.open(path, os.O_RDONLY | NO_LINK)
            _lock(handle)
            if path.is_dir():
                break
            os.close(handle)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def sweep(folder: Path, name: str = "") -> None:
    """Remove the temporary files and folders of the file `name` that no process works on; without it those of all."""
    if fcntl is None:
        return
    names = list[str]()
    with suppress(OSError):  # there is no folder, or it may not be read
        names = os.listdir(folder)
    for found in map(OWN_NAME.fullmatch, names):
        if found is None or (name and found[1] != _cut(name)):
            continue
        path = folder / found[0]
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _cut(name: str) -> str:
    """What a temporary name has of its file's name, which may be as long as the system allows."""
    encoded = os.fsencode(name)
    # Half a character would be no name on macOS and Windows.
    return name if len(encoded) <= MAX_NAME_BYTES else encoded[:MAX_NAME_BYTES].decode(errors="ignore")


def _lock(handle: int) -> None:
    """Lock a new file or folder. Waits for a `sweep` that holds it, which then removes it."""
    if fcntl is None:
        return
    with suppress(OSError):  # a file system without locks: `sweep` removes nothing there
        fcntl.flock(handle, fcntl.LOCK_EX)

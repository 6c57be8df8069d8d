"""Reads text that people write: configs, keys, templates, prompts, JSON files, request bodies.

A byte order mark is removed, and CR LF ends a line as LF does. Interprets no format; `unique_fields` is for those who
read JSON. Reading a pipe or a device is limited in size and time, so that it cannot block a start.
"""

from __future__ import annotations

import codecs
import os
import select
import stat
import time
from collections import Counter
from pathlib import Path
from typing import Any

from brlite.files.quoting import excerpt

BYTE_ORDER_MARK = codecs.BOM_UTF8
MAX_TEXT_BYTES = 16 * 2**20  # of a config, a key file, a template: far above real sizes
WAIT_SECONDS = 10.0  # for a pipe to give all of its text
CHUNK_BYTES = 2**20
# The longer mark comes first: UTF-32's begins as UTF-16's does.
_OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class TextError(ValueError):
    """Why a text cannot be read, without its file's name: the caller says which file, and what it is for."""


def read_text(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, wait_seconds: float = WAIT_SECONDS) -> str:
    """The text in a file. Raises `TextError`, also where there is no file, or more or slower text than allowed."""
    return decode_text(read_bounded(path, max_bytes=max_bytes, wait_seconds=wait_seconds))


def read_bounded(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, wait_seconds: float = WAIT_SECONDS) -> bytes:
    """A file's bytes; a leading `~` is the home folder. Raises `TextError`, also for an endless pipe or device."""
    try:
        handle = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return _read_all(handle, max_bytes, wait_seconds)
        finally:
            os.close(handle)
    except TextError:
        raise
    except OSError as error:
        raise TextError(error.strerror or type(error).__name__) from None
    except ValueError as error:  # a zero byte in the path
        raise TextError(str(error)) from None


def decode_text(data: bytes) -> str:
    """UTF-8 as text, without its mark, with LF at the end of each line. Raises `TextError`."""
    if other := other_encoding(data):
        raise TextError(other)
    try:
        return data.removeprefix(BYTE_ORDER_MARK).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise TextError(f"byte {error.start} is not UTF-8") from None


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `object_pairs_hook` of `json.loads`. Raises `ValueError` for a field that it has twice.

    Readers differ in which one of the two counts.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{excerpt(name)} is given twice in one object")
    return fields


def other_encoding(data: bytes) -> str | None:
    """The error message for a text in another Unicode encoding than UTF-8; None for other texts."""
    for mark, name in _OTHER_ENCODINGS:
        if data.startswith(mark):
            return f"it is {name} text; UTF-8 is needed"
    # Without a mark: of two bytes that begin a text in a Western script, one is zero.
    if len(data) > 1 and (data[0] == 0) != (data[1] == 0):
        return "it looks like UTF-16 text; UTF-8 is needed"
    return None


def _read_all(handle: int, max_bytes: int, wait_seconds: float) -> bytes:
    kind, deadline = os.fstat(handle).st_mode, time.monotonic() + wait_seconds
    if stat.S_ISDIR(kind):
        raise TextError("it is a directory")
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    data = bytearray()
    while len(data) <= max_bytes:
        if not stat.S_ISREG(kind) and not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TextError(f"it is a pipe or a device, and its text did not end within {wait_seconds:g} s")
        try:
            chunk = os.read(handle, min(CHUNK_BYTES, max_bytes + 1 - len(data)))
        except BlockingIOError:
            continue
        if not chunk:
            return bytes(data)
        data += chunk
    raise TextError(f"it is larger than {max_bytes} bytes")

"""The key-value header of a GGUF file as a plain dict, in a fraction of a second. Knows no tensors and no meanings.

`gguf.GGUFReader` makes numpy arrays of every string, which takes seconds for a vocabulary of 49,152 tokens; here it is
0.1 s.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from brlite.errors import ModelError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_COUNT = struct.Struct("<Q")


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Every key of the header: numbers, booleans, strings and lists of them. Raises `ModelError` for a broken file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except (struct.error, IndexError, OverflowError, UnicodeDecodeError):
        raise ModelError(f"{path}: the GGUF header is cut short or damaged") from None
    except ValueError as error:  # mmap's for an empty file, and our own
        raise ModelError(f"{path}: {error}") from None


class _Header:
    """A reading position in the file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 0

    def read(self) -> dict[str, Any]:
        magic, version = self._data[:4], struct.unpack_from("<I", self._data, 4)[0]
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"not a little-endian GGUF file of version {' or '.join(map(str, _VERSIONS))}")
        self._position = 16  # after the magic, the version and the number of tensors
        return dict(self._entry() for _ in range(self._count()))

    def _entry(self) -> tuple[str, Any]:
        [key] = self._strings(1)
        [kind] = self._numbers("I", 1)
        return key, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind == _ARRAY:
            [kind] = self._numbers("I", 1)
            return self._values(kind, self._count())
        return self._values(kind, 1)[0]

    def _values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            raise ValueError("its GGUF header holds a list of lists, which no known key has")
        if kind not in _NUMBERS:
            raise ValueError(f"its GGUF header holds a value of unknown type {kind}")
        return self._numbers(_NUMBERS[kind], count)

    def _numbers(self, code: str, count: int) -> list[Any]:
        layout = f"<{count}{code}"
        if count > len(self._data):
            raise IndexError
        values = struct.unpack_from(layout, self._data, self._position)
        self._position += struct.calcsize(layout)
        return list(values)

    def _strings(self, count: int) -> list[str]:
        data, position, unpack = self._data, self._position, _COUNT.unpack_from
        strings = []
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0]
            strings.append(data[start:position].decode())
        if position > len(data):
            raise IndexError
        self._position = position
        return strings

    def _count(self) -> int:
        [count] = _COUNT.unpack_from(self._data, self._position)
        self._position += 8
        return int(count)

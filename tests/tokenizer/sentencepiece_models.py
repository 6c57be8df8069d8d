"""Writes `tokenizer.model` files field by field, also such as no trainer makes."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2


def varint(number: int) -> bytes:
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: str | bytes, kind: int = NORMAL, score: float = -1.0) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    score_field = varint(2 << 3 | 5) + struct.pack("<f", score)
    return bytes_field(1, bytes_field(1, encoded) + score_field + number_field(3, kind))


BASE = [piece("<unk>", UNKNOWN, 0.0), piece("<s>", CONTROL, 0.0), piece("</s>", CONTROL, 0.0), piece("▁"), piece("a")]


def model(
    pieces: Iterable[bytes] = (), *, kind: int = UNIGRAM, charsmap: bytes = b"", base: Iterable[bytes] = BASE
) -> bytes:
    normalizer = bytes_field(1, b"mine") + (bytes_field(2, charsmap) if charsmap else b"")
    return b"".join([*base, *pieces]) + bytes_field(2, number_field(3, kind)) + bytes_field(3, normalizer)


def charsmap(replacements: dict[bytes, bytes]) -> bytes:
    """A trie of single bytes, each with what it becomes: one block for the root's children, one for each leaf."""
    units = [0] * (256 * (2 + len(replacements)))
    values = b""
    units[0] = 256 << 10
    for index, (old, new) in enumerate(replacements.items()):
        node, leaves = 256 ^ old[0], 256 * (2 + index)
        units[node] = old[0] | 1 << 8 | (node ^ leaves) << 10
        units[leaves] = 1 << 31 | len(values)
        values += new + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + values


def write_model(folder: Path, data: bytes) -> Path:
    (folder / "tokenizer.model").write_bytes(data)
    return folder

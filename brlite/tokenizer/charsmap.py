"""Checks sentencepiece's table that normalizes characters: a trie, and the replacements that its leaves point to.

Libraries do not check it, and some read beyond its end. Sizes, offsets and replacements are checked here first.
"""

from __future__ import annotations

import struct
import sys
from array import array

MAX_REPLACEMENT_BYTES = 256  # of one character; U+FDFA has 33
_BLOCK = 0xFF  # the units of a node's children lie in one block of 256
_LEAF = 1 << 31


def check_charsmap(data: bytes) -> None:
    """Raises `ValueError` for a table with an offset beyond its end, or a replacement of more than 256 bytes."""
    if len(data) < 4:
        raise ValueError("precompiled_charsmap must have at least 4 bytes")
    (num_bytes,) = struct.unpack_from("<I", data)
    if num_bytes % 4 or 4 + num_bytes > len(data):
        raise ValueError(f"precompiled_charsmap names a trie of {num_bytes} bytes and has {len(data) - 4}")
    replacements = data[4 + num_bytes :]
    if max(map(len, replacements.split(b"\0"))) > MAX_REPLACEMENT_BYTES:
        raise ValueError(f"precompiled_charsmap replaces a character with more than {MAX_REPLACEMENT_BYTES} bytes")
    if not replacements.endswith(b"\0"):
        raise ValueError("precompiled_charsmap must end with a zero byte")
    units = array("I", data[4 : 4 + num_bytes])
    if sys.byteorder == "big":
        units.byteswap()
    # Darts-clone's units: a label and an offset to the children, or a leaf with the offset of a replacement.
    for index, unit in enumerate(units):
        if unit & _LEAF:
            is_inside = unit & (_LEAF - 1) < len(replacements)
        else:
            child = index ^ ((unit >> 10) << ((unit & 0x200) >> 6))
            is_inside = child | _BLOCK < len(units) and (not unit & 0x100 or bool(units[child] & _LEAF))
        if not is_inside:
            raise ValueError("precompiled_charsmap leads beyond its end")

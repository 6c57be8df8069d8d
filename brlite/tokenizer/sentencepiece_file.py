"""A strict reader of `tokenizer.model`, sentencepiece's protocol buffer, since the library reads it without checks.

Checks lengths against the file's size, the kinds and texts of the pieces, and the tables that normalise characters.
Encodes no text: the library does, in a child process (`encoder.py`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from brlite.checkpoint.model_file import check_model_file
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason
from brlite.tokenizer.charsmap import check_charsmap
from brlite.tokenizer.pieces import MAX_PIECE, PieceKind, VocabularyPiece

MAX_FILE_BYTES = 64 * 1024 * 1024  # the largest published ones have 5 MB
MAX_VARINT_BYTES = 10

# Fields of sentencepiece's ModelProto, of its SentencePiece, and of its NormalizerSpec.
_PIECES, _NORMALIZER, _DENORMALIZER = 1, 3, 5
_TEXT, _SCORE, _KIND = 1, 2, 3
_CHARSMAP = 2

_FIXED_SIZES = {1: 8, 5: 4}  # bytes, by wire type

Value = int | bytes


class SentencePieceFile(NamedTuple):
    """The file's bytes, and its pieces in the order of their ids."""

    data: bytes
    pieces: list[VocabularyPiece]


def read_sentencepiece_file(path: Path) -> SentencePieceFile:
    """Raises `ModelError` for a file that is no sentencepiece model, or that could exhaust or crash the library."""
    check_model_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {reason(error)}") from None
    try:
        return SentencePieceFile(data, _read_pieces(data))
    except ValueError as error:
        raise ModelError(f"{path}: not a sentencepiece model: {reason(error)}") from None


def _read_pieces(data: bytes) -> list[VocabularyPiece]:
    """The pieces of a whole file. Checks its normalizers too."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"has more than {MAX_FILE_BYTES} bytes")
    pieces = []
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(_message(value)))
        elif number in (_NORMALIZER, _DENORMALIZER):
            for field, table in _fields(_message(value)):
                if field == _CHARSMAP and (charsmap := _message(table)):
                    check_charsmap(charsmap)
    if not pieces:
        raise ValueError("has no pieces")
    return pieces


def _piece(message: bytes) -> VocabularyPiece:
    """Decode one piece. The last one of a repeated field counts, as in every reader of protocol buffers."""
    fields = dict(_fields(message))
    encoded, score, kind = _message(fields.get(_TEXT, b"")), fields.get(_SCORE, bytes(4)), fields.get(_KIND, 1)
    if not isinstance(score, bytes) or len(score) != 4 or not math.isfinite(number := struct.unpack("<f", score)[0]):
        raise ValueError("a piece's score must be a finite number of 4 bytes")
    if not isinstance(kind, int) or not 1 <= kind <= len(PieceKind):
        raise ValueError(f"a piece's kind must be from 1 to 6, got {excerpt(kind)}")
    try:
        text = encoded.decode()
    except UnicodeDecodeError:
        raise ValueError(f"a piece must be UTF-8, got {excerpt(encoded)}") from None
    if not 0 < len(text) <= MAX_PIECE or "\0" in text:
        raise ValueError(f"a piece must have 1 to {MAX_PIECE} characters and no zero byte, got {excerpt(text)}")
    return VocabularyPiece(text, number, PieceKind(kind))


def _message(value: Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("has a number where text or a message belongs")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Pairs of field number and value: an integer, or the bytes of any other type."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if number == 0 or wire_type not in (0, 1, 2, 5):
            raise ValueError(f"has a field {number} of wire type {wire_type} at byte {at}")
        value, start = _varint(message, at) if wire_type in (0, 2) else (_FIXED_SIZES[wire_type], at)
        if wire_type == 0:
            yield number, value
            at = start
            continue
        at = start + value
        if at > len(message):
            raise ValueError(f"a field of {value} bytes goes beyond the {len(message)} bytes that hold it")
        yield number, message[start:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint of up to 64 bits, and the position after it."""
    if at < len(message) and message[at] < 0x80:
        return message[at], at + 1
    value = 0
    for index in range(MAX_VARINT_BYTES):
        if at + index == len(message):
            break
        byte = message[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & (2**64 - 1), at + index + 1
    raise ValueError(f"a number at byte {at} does not end")

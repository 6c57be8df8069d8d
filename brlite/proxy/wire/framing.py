"""Body framing of HTTP/1.1: by Content-Length, by chunks, or until the connection ends. Bytes in, payload out.

RFC 9112 §6 and §7. Strict: a chunk size is hexadecimal digits only, lines end with CR LF, and a trailer consists of
header fields. Trailers are dropped. Contains no sockets and no media types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

MAX_CHUNK_LINE = 1024
MAX_TRAILER_BYTES = 8192
LAST_CHUNK = b"0\r\n\r\n"

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSIONS = rb"(?:[ \t]*;" + _TOKEN + rb"(?:=(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?)*"
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})" + _EXTENSIONS + rb"\r\n")
FIELD_LINE = _TOKEN + rb":[\t -~\x80-\xff]*\r\n"  # no folded lines: RFC 9112 §5.2 forbids them

_CUT_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}(?:[ \t;][^\n]*|\r)?")  # the beginning of a chunk's line
_TRAILER_LINE = re.compile(FIELD_LINE + rb"|\r\n")


class FramingError(Exception):
    """The framing is malformed. `payload` is the payload before the fault in the same bytes."""

    payload = b""


class Body(Protocol):
    """A body as it arrives. `excess` are the bytes after its end."""

    is_done: bool
    excess: bytes

    def feed(self, data: bytes) -> bytes:
        """Read the next bytes. Returns the payload in them. Raises `FramingError`."""

    def feed_eof(self) -> None:
        """Handle the end of the connection. Raises `FramingError` if the body is incomplete."""


class LengthBody:
    """A body with a Content-Length."""

    __slots__ = ("_missing", "excess", "is_done")

    def __init__(self, num_bytes: int) -> None:
        self._missing = num_bytes
        self.is_done = num_bytes == 0
        self.excess = b""

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._missing:
            self.excess += data[self._missing :]
            data = data[: self._missing]
        self._missing -= len(data)
        self.is_done = self._missing == 0
        return data

    def feed_eof(self) -> None:
        if not self.is_done:
            raise FramingError("it ends before its Content-Length")


class CloseBody:
    """A body that ends with its connection."""

    __slots__ = ("excess", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self.excess = b""

    def feed(self, data: bytes) -> bytes:
        return data

    def feed_eof(self) -> None:
        self.is_done = True


class ChunkedBody:
    """A body in chunks. `is_at_boundary` is true between two chunks."""

    __slots__ = ("_data", "_in_chunk", "_in_trailer", "_trailer_bytes", "excess", "is_done")

    def __init__(self) -> None:
        self._data = b""  # the beginning of an incomplete line
        self._in_chunk = 0  # bytes of the chunk that are still to come, its line end included
        self._in_trailer = False
        self._trailer_bytes = 0
        self.is_done = False
        self.excess = b""

    @property
    def is_at_boundary(self) -> bool:
        return not (self._in_chunk or self._data or self._in_trailer or self.is_done)

    def feed(self, data: bytes) -> bytes:
        if self._data:
            data, self._data = self._data + data, b""
        payload: list[bytes] = []
        position = 0
        try:
            while position < len(data) and not self.is_done:
                if self._in_trailer:
                    position = self._read_trailer(data, position)
                elif self._in_chunk:
                    position = self._read_chunk(data, position, payload)
                else:
                    position = self._read_size(data, position)
        except FramingError as error:
            error.payload = b"".join(payload)
            raise
        if self.is_done:
            self.excess += data[position:]
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def feed_eof(self) -> None:
        if not self.is_done:
            raise FramingError("it ends in the middle of its chunks")

    def _read_size(self, data: bytes, position: int) -> int:
        match = CHUNK_SIZE.match(data, position)
        if match is None:
            line = data[position:]
            if not _CUT_SIZE.fullmatch(line) or len(line) > MAX_CHUNK_LINE:
                raise FramingError("a chunk has no valid size")
            self._data = line
            return len(data)
        if match.end() - position > MAX_CHUNK_LINE:
            raise FramingError("a chunk's extensions are too long")
        size = int(match[1], 16)
        if size:
            self._in_chunk = size + 2
        else:
            self._in_trailer = True
        return match.end()

    def _read_chunk(self, data: bytes, position: int, payload: list[bytes]) -> int:
        piece = data[position : position + self._in_chunk]
        missing = self._in_chunk = self._in_chunk - len(piece)
        num_end = min(len(piece), max(0, 2 - missing))  # bytes of the chunk's line end that are in the piece
        if len(piece) > num_end:
            payload.append(piece[: len(piece) - num_end])
        if piece[len(piece) - num_end :] != b"\r\n"[2 - missing - num_end : 2 - missing]:
            raise FramingError("a chunk is longer than its size")
        return position + len(piece)

    def _read_trailer(self, data: bytes, position: int) -> int:
        line_end = data.find(b"\n", position) + 1 or len(data)
        if self._trailer_bytes + line_end - position > MAX_TRAILER_BYTES:
            raise FramingError("its trailer is too long")
        if not data.endswith(b"\n", position, line_end):
            self._data = data[position:]
            return line_end
        # A server that accepts a bare LF as a line end could read other bytes as a request (request smuggling).
        if not _TRAILER_LINE.fullmatch(data, position, line_end):
            raise FramingError("its trailer has a line that is no header field")
        self._trailer_bytes += line_end - position
        self.is_done = line_end - position == 2
        return line_end


def body_of(fields: Mapping[bytes, bytes], length: int | None, *, without: Body) -> Body:
    """The body that Transfer-Encoding or Content-Length announces; `without` if neither does. Raises `FramingError`."""
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        if length is not None or coding.lower() != b"chunked":
            raise FramingError("its Transfer-Encoding is not chunked alone")
        return ChunkedBody()
    return without if length is None else LengthBody(length)

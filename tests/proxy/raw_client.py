"""A client that sends bytes as they are, reads answers strictly, and says what it has seen in one word."""

from __future__ import annotations

import asyncio
from typing import Literal, NamedTuple

import msgspec

Verdict = Literal["whole", "error", "error_event", "cut"]

DONE = b"data: [DONE]\n\n"
EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
JSON_TYPE = b"application/json"


class BadAnswer(AssertionError):
    """What came is no answer."""


class Answer(NamedTuple):
    """A final answer. `is_cut` says that its connection ended before its body did."""

    status: int
    fields: dict[bytes, bytes]
    body: bytes
    is_cut: bool = False
    num_interim: int = 0

    @property
    def is_stream(self) -> bool:
        return self.fields.get(b"content-type", b"").startswith(b"text/event-stream")

    @property
    def error(self) -> dict[str, object]:
        return msgspec.json.decode(self.body)["error"]

    def verdict(self, expected: bytes, status: int = 200) -> Verdict:
        """What it is, if the whole answer has `expected` as its body. Raises `BadAnswer` for what must never be."""
        if self.is_cut:
            check(expected.startswith(self.body), f"garbage {self.body[:200]!r}")
            return "cut"
        if (self.status, self.body) == (status, expected):
            return "whole"
        if self.is_stream:
            return self._broken_stream(expected)
        check(self.status == 429 or self.status >= 500, f"{self.status} {self.body[:300]!r}")
        check(self.fields[b"content-type"].startswith(JSON_TYPE), f"no JSON: {self.fields}")
        check(isinstance(self.error["message"], str), f"no message: {self.body[:300]!r}")
        return "error"

    def _broken_stream(self, expected: bytes) -> Verdict:
        check(self.body.endswith(DONE), f"a stream without its end: {self.body[-300:]!r}")
        before, mark, error = self.body[: -len(DONE)].rpartition(b'data: {"error":')
        check(mark != b"" and error.endswith(b"\n\n"), f"truncated in silence: {self.body[-300:]!r}")
        check("message" in msgspec.json.decode(b'{"error":' + error)["error"], f"no message: {error!r}")
        check(expected.startswith(before), f"garbage {before[:300]!r}")
        check(not before or before.endswith(EVENT_ENDS), f"half an event {before[-100:]!r}")
        return "error_event"


def check(is_good: bool, text: str) -> None:
    if not is_good:
        raise BadAnswer(text)


class Client:
    """One connection to the server under test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**26))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def leave(self) -> None:
        self.writer.transport.abort()

    @property
    def has_answer(self) -> bool:
        """Whether a byte of an answer has come that was not read yet."""
        return bool(self.reader._buffer)  # type: ignore[attr-defined]  # asyncio has no public way to ask

    async def is_closed(self) -> bool:
        """Whether the server ends the connection, without another byte."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    async def is_closed_after(self, body: bytes) -> bool:
        """Whether the server ends the connection, with an answer that has this body or without any."""
        rest = await self.reader.read()
        return rest == b"" or rest.endswith(body)

    async def answer(self) -> Answer:
        """The next final answer."""
        num_interim = 0
        while True:
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                raise BadAnswer(f"silence, after {error.partial[:200]!r}") from None
            line, *lines = head[:-4].split(b"\r\n")
            check(line.startswith(b"HTTP/"), f"no status line: {line!r}")
            status = int(line[9:12])
            if status >= 200:
                break
            num_interim += 1
        fields = _fields(lines)
        check(status != 204 or not fields.keys() & {b"content-length", b"transfer-encoding"}, "204 has no body")
        try:
            body = b"" if status == 204 else await self._body(fields, line.startswith(b"HTTP/1.0"))
        except _Cut as cut:
            return Answer(status, fields, cut.body, is_cut=True, num_interim=num_interim)
        return Answer(status, fields, body, num_interim=num_interim)

    async def _body(self, fields: dict[bytes, bytes], is_1_0: bool) -> bytes:
        if b"transfer-encoding" in fields:
            check(
                fields[b"transfer-encoding"] == b"chunked" and b"content-length" not in fields, "contradicting fields"
            )
            return await self._chunks()
        try:
            if b"content-length" in fields:
                return await self.reader.readexactly(int(fields[b"content-length"]))
            check(fields.get(b"connection") == b"close" or is_1_0, "a body without an end")
            return await self._until_close()
        except asyncio.IncompleteReadError as error:
            raise _Cut(error.partial) from None
        except ConnectionError:
            raise _Cut(b"") from None

    async def _until_close(self) -> bytes:
        parts: list[bytes] = []
        try:
            while part := await self.reader.read(2**16):
                parts.append(part)
        except ConnectionError:
            raise _Cut(b"".join(parts)) from None
        return b"".join(parts)

    async def chunk(self) -> bytes:
        """The payload of the next chunk of a body; b"" for the last one."""
        size = int((await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16)
        part = await self.reader.readexactly(size + 2)
        check(part.endswith(b"\r\n"), f"a bad chunk: {part[-20:]!r}")
        return part[:-2]

    async def _chunks(self) -> bytes:
        parts: list[bytes] = []
        try:
            while part := await self.chunk():
                parts.append(part)
            return b"".join(parts)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _Cut(b"".join(parts)) from None


class _Cut(Exception):
    def __init__(self, body: bytes) -> None:
        self.body = body


def _fields(lines: list[bytes]) -> dict[bytes, bytes]:
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        check(colon == b":" and name == name.strip() and name.lower() not in fields, f"a bad header: {line!r}")
        fields[name.lower()] = value.strip()
    return fields


def post(
    body: object, *headers: bytes, path: bytes = b"/v1/chat/completions", version: bytes = b"1.1", has_host: bool = True
) -> bytes:
    """A request with this JSON body, or these bytes."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    own = (b"Content-Type: application/json", b"Content-Length: %d" % len(data))
    lines = [b"POST %b HTTP/%b" % (path, version), *([b"Host: proxy"] if has_host else []), *own, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + data

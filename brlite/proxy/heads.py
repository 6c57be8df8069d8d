"""Heads of HTTP/1.1 messages: reads those of requests and answers, strictly, and makes those that are passed on.

RFC 9112. What is doubtful in a request is not repaired but left to aiohttp, which refuses it in our words; a doubtful
answer is an error of the upstream. Knows no sockets and no bodies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

from brlite.errors import UpstreamError

MAX_HEADERS = 100
MAX_ANSWER_HEAD_BYTES = 64 * 1024
MAX_HOPS = 8

END_OF_HEAD = b"\r\n\r\n"

_FIELDS = rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n)*)\r\n"
_REQUEST = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.([01])\r\n" + _FIELDS)
_ANSWER = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t -~\x80-\xff]*)?\r\n" + _FIELDS)
_FIELD = re.compile(rb"([^:\r\n]+):[ \t]*([^\r\n]*?)[ \t]*\r\n")

# A request that has one of them twice can mean two things.
_ONCE_ONLY = frozenset(
    b"host content-length transfer-encoding content-type content-encoding authorization x-api-key expect".split()
)
_HOP_BY_HOP = rb"connection|keep-alive|proxy-[^:\r\n]*|te|trailer|transfer-encoding|upgrade|content-length"


def _lines(names: bytes) -> re.Pattern[bytes]:
    return re.compile(rb"^(?:" + names + rb"):[^\n]*\n", re.IGNORECASE | re.MULTILINE)


# Keys and cookies are between the client and us; what the answer may be encoded in is ours to say.
_NOT_FOR_UPSTREAMS = _lines(
    _HOP_BY_HOP + rb"|host|authorization|x-api-key|cookie|expect|accept-encoding|x-request-id|via"
)
_NOT_FOR_CLIENTS = _lines(_HOP_BY_HOP + rb"|set-cookie|alt-svc|x-request-id|access-control-[^:\r\n]*")

_REASONS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class RequestHead(NamedTuple):
    """A request's head. `fields` has lower-case names; what may stand twice is joined by commas."""

    method: bytes
    target: bytes
    is_http_1_0: bool
    fields: Mapping[bytes, bytes]
    lines: bytes
    num_bytes: int

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection may take another request after this one."""
        wish = self.fields.get(b"connection", b"").lower()
        return b"keep-alive" in wish if self.is_http_1_0 else b"close" not in wish


class AnswerHead(NamedTuple):
    """An answer's head, `fields` as in a request's."""

    status: int
    is_http_1_0: bool
    fields: Mapping[bytes, bytes]
    lines: bytes
    num_bytes: int

    @property
    def content_type(self) -> bytes:
        """Such as `application/json`, without parameters."""
        return self.fields.get(b"content-type", b"").partition(b";")[0].strip().lower()

    @property
    def content_length(self) -> int | None:
        """The length that it announces, once that is known to be a number."""
        length = self.fields.get(b"content-length")
        return None if length is None else int(length)

    @property
    def keeps_alive(self) -> bool:
        wish = self.fields.get(b"connection", b"").lower()
        return b"keep-alive" in wish if self.is_http_1_0 else b"close" not in wish


def read_request(data: bytes) -> RequestHead | None:
    """The head at the beginning of `data`, which holds a whole one; None if there is anything odd about it."""
    match = _REQUEST.match(data)
    if match is None:
        return None
    method, target, minor, lines = match.groups()
    fields = _read_fields(lines)
    if fields is None or (b"host" not in fields and minor == b"1"):
        return None
    return RequestHead(method, target, minor == b"0", fields, lines, match.end())


def read_answer(data: bytes) -> AnswerHead:
    """The head at the beginning of `data`, which holds a whole one. Raises `UpstreamError`."""
    match = _ANSWER.match(data)
    if match is None:
        raise UpstreamError("The upstream's answer is not HTTP.")
    minor, status, lines = match.groups()
    fields = _read_fields(lines)
    if fields is None:
        raise UpstreamError("The upstream's answer has headers that contradict each other, or too many.")
    return AnswerHead(int(status), minor == b"0", fields, lines, match.end())


def lines_for_upstreams(head: RequestHead, request_id: str, via: bytes) -> bytes:
    """The header lines that any upstream may see: the client's, less what is not for it, with our id and `Via`."""
    lines = _NOT_FOR_UPSTREAMS.sub(b"", _without_named(head.lines, head.fields))
    hops = head.fields.get(b"via")
    via = via if hops is None else hops + b", " + via
    return lines + b"X-Request-Id: " + request_id.encode() + b"\r\nVia: " + via + b"\r\n"


def lines_for_clients(head: AnswerHead) -> bytes:
    """The header lines of the answer that a client may see; how the body is framed is to be added."""
    return _NOT_FOR_CLIENTS.sub(b"", _without_named(head.lines, head.fields))


def status_line(status: int) -> bytes:
    """`HTTP/1.1 200 OK` and its line end. The upstream's own words for a status are not passed on."""
    return _REASONS.get(status) or b"HTTP/1.1 %d \r\n" % status


def _read_fields(lines: bytes) -> dict[bytes, bytes] | None:
    """The fields by name, or None if there are too many, or twice one that may stand there once."""
    found = _FIELD.findall(lines)
    if len(found) > MAX_HEADERS:
        return None
    fields: dict[bytes, bytes] = {}
    for name, value in found:
        name = name.lower()
        if name not in fields:
            fields[name] = value
        elif name in _ONCE_ONLY:
            return None
        else:
            fields[name] += b", " + value
    return fields


def _without_named(lines: bytes, fields: Mapping[bytes, bytes]) -> bytes:
    """The lines without those that the `Connection` header names as being for the next hop only."""
    wish = fields.get(b"connection")
    if wish is None or wish.lower() in (b"keep-alive", b"close"):
        return lines
    names = b"|".join(re.escape(name.strip()) for name in wish.split(b",") if name.strip())
    return _lines(names).sub(b"", lines) if names else lines

"""Heads of HTTP/1.1 messages: reads those of requests and responses, strictly, and selects the lines to forward.

RFC 9112. A malformed request is not repaired: aiohttp gets it and refuses it. A malformed response is an error of the
upstream. Most heads differ only in their Content-Length, so parsed heads are cached. Contains no sockets and no bodies.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Generic, TypeVar

from brlite.config.options import NEVER_TO_CLIENTS, NEVER_TO_UPSTREAMS, Forwarded
from brlite.errors import UpstreamError
from brlite.http.connection import MAX_HEADERS
from brlite.http.keys import shown_key
from brlite.proxy.wire.framing import FIELD_LINE

H = TypeVar("H")

MAX_ANSWER_HEAD_BYTES = 64 * 1024
MAX_HOPS = 8
MAX_CLAIM_BYTES = 1024  # of a client's `X-Forwarded-For`, to which the address is appended; a longer one is dropped
MAX_INTERIM_ANSWERS = 100
MAX_REMEMBERED = 256
MAX_REMEMBERED_BYTES = 2048  # of one head

END_OF_HEAD = b"\r\n\r\n"
BODYLESS = (204, 304)  # statuses of responses without a body
# Paths of POST requests that a model computes. Other paths, such as those that load an adapter, are not forwarded.
FORWARDED_PATHS = frozenset(
    b"/v1/chat/completions /v1/completions /v1/responses /v1/messages /v1/messages/count_tokens /v1/embeddings "
    b"/pooling /v1/rerank /v2/rerank /v1/reranking /v1/score /v1/classify /v1/moderations /v1/images/generations "
    b"/v1/audio/speech /infill /tokenize /detokenize /apply-template /explain /v1/responses/input_tokens "
    b"/v1/chat/completions/render /v1/completions/render".split()
)
# Requests about one stored response. Its id determines the upstream.
_STORED = re.compile(rb"/v1/responses/([A-Za-z0-9_.:=~+-]{1,200})(/cancel|/input_items)?(?:\?[!-~]*)?")
_NEEDLESS_ESCAPE = re.compile(rb"%(2[DEde]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")  # RFC 3986 §6.2.2.2
_STORED_METHODS = {None: (b"GET", b"DELETE"), b"/cancel": (b"POST",), b"/input_items": (b"GET",)}


def _cut(literal: bytes, rest: bytes) -> bytes:
    """A pattern that matches every prefix of a literal, and the whole literal followed by `rest`."""
    for code in reversed(literal):
        rest = b"(?:%b%b)?" % (re.escape(bytes([code])), rest)
    return rest


@lru_cache(maxsize=16)
def _pattern_of(names: tuple[str, ...]) -> re.Pattern[bytes]:
    """A pattern for header lines with these names. A name that ends in `*` is a prefix."""
    patterns = [re.escape(name.rstrip("*")) + (r"[^:\r\n]*" if name.endswith("*") else "") for name in names]
    return re.compile(rf"^(?:{'|'.join(patterns)}):[^\n]*\n".encode(), re.IGNORECASE | re.MULTILINE)


_METHODS = b"GET HEAD POST PUT PATCH DELETE OPTIONS".split()  # aiohttp answers other methods
_FIELDS = rb"((?:" + FIELD_LINE + rb")*)\r\n"
_REQUEST = re.compile(rb"(" + b"|".join(_METHODS) + rb") (/[!-~]*) HTTP/1\.([01])\r\n" + _FIELDS)
_ANSWER = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t -~\x80-\xff]*)?\r\n" + _FIELDS)
_FIELD = re.compile(rb"([^:\r\n]+):[ \t]*((?:[^\r\n]*[^ \t\r\n])?)[ \t]*\r\n")
_LENGTH = re.compile(rb"\r\n(?i:content-length):[ \t]*([0-9]{1,15})[ \t]*(?=\r\n)")

# Patterns for an incomplete request head: the lines up to its last line end, and the part after it.
_WHOLE_LINES = re.compile(rb"(?:" + FIELD_LINE + rb")*")
_FIRST_LINES = re.compile(rb"(?:" + b"|".join(_METHODS) + rb") /[!-~]* HTTP/1\.[01]\r\n" + _WHOLE_LINES.pattern)
_CUT_LINE = re.compile(rb"\r|[!#$%&'*+\-.^_`|~0-9A-Za-z]*(?:(?<=.):[\t -~\x80-\xff]*\r?)?")
_CUT_FIRST_LINE = re.compile(
    b"|".join(_cut(method + b" /", rb"[!-~]*" + _cut(b" HTTP/1.", rb"(?:[01]\r?)?")) for method in _METHODS)
)

# A message that has one of these twice is ambiguous.
_ONCE_ONLY = frozenset(
    b"host content-length transfer-encoding content-type content-encoding authorization x-api-key expect".split()
)


# Only listed headers are forwarded: others may steer an upstream (`OpenAI-Organization`, `X-HTTP-Method-Override`) or a
# browser (`Set-Cookie`, `Clear-Site-Data`). `proxy.request_headers` and `proxy.response_headers` add to the list.
REQUEST_HEADERS = (
    "accept",
    "anthropic-*",
    "baggage",
    "content-type",
    "idempotency-key",
    "last-event-id",
    "openai-beta",
    "traceparent",
    "tracestate",
    "user-agent",
)
RESPONSE_HEADERS = (
    "anthropic-ratelimit-*",
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-type",
    "date",
    "openai-model",
    "openai-processing-ms",
    "openai-version",
    "request-id",
    "retry-after",
    "retry-after-ms",
    "x-accel-buffering",
    "x-ratelimit-*",
    "x-should-retry",
)
# Never forwarded, even if a name in the config matches.
_NEVER_TO_UPSTREAMS = _pattern_of(NEVER_TO_UPSTREAMS)
_NEVER_TO_CLIENTS = _pattern_of(NEVER_TO_CLIENTS)

_LIMITS = _pattern_of(("x-ratelimit-*",))
_CACHE_CONTROL = _pattern_of(("cache-control",))
_IDEMPOTENCY_KEY = _pattern_of(("idempotency-key",))

_REASONS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class RequestHead:
    """A request's head without its Content-Length. `fields` has lower-case names; repeated fields are joined by commas.

    `is_for_json`: the request may have a JSON body for a model. `asked_by`: the fields that an `OriginPolicy` checks.
    """

    __slots__ = (
        "_lines",
        "_more",
        "_selected",
        "asked_by",
        "fields",
        "is_chunked",
        "is_for_json",
        "is_http_1_0",
        "is_upgrade",
        "keeps_alive",
        "method",
        "shown_key",
        "target",
        "via",
    )

    def __init__(
        self, method: bytes, target: bytes, fields: Mapping[bytes, bytes], lines: bytes, *, is_http_1_0: bool
    ) -> None:
        self.method = method
        self.target = target
        self.fields = fields
        self.is_http_1_0 = is_http_1_0
        self.keeps_alive = _keeps_alive(fields, is_http_1_0=is_http_1_0)
        self._lines = _NEVER_TO_UPSTREAMS.sub(b"", _without_named(lines, fields))
        self._more: tuple[str, ...] | None = None
        self._selected = b""
        self.is_chunked = b"transfer-encoding" in fields
        self.is_upgrade = b"upgrade" in fields
        self.via = fields.get(b"via")
        self.shown_key = shown_key(field_text(fields.get(b"authorization")), field_text(fields.get(b"x-api-key")))
        self.asked_by = tuple(field_text(fields.get(name)) for name in (b"host", b"origin", b"sec-fetch-site"))
        kind = fields.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
        self.is_for_json = (
            method == b"POST"
            and is_forwardable(target)
            and (kind == b"application/json" or kind.endswith(b"+json"))
            and fields.get(b"content-encoding", b"identity").lower() == b"identity"
            and fields.get(b"expect", b"100-continue").lower() == b"100-continue"
        )

    def lines_for_upstreams(self, request_id: str, own_via: bytes, more: tuple[str, ...]) -> bytes:
        """The header lines to forward to any upstream, with our id and `Via`. `more` are further names to forward.

        The last selection is cached, because heads repeat.
        """
        if more is not self._more:
            self._more, self._selected = more, _select(self._lines, (*REQUEST_HEADERS, *more))
        via = own_via if self.via is None else self.via + b", " + own_via
        return b"%bX-Request-Id: %b\r\nVia: %b\r\n" % (self._selected, request_id.encode(), via)


class AnswerHead:
    """A response's head without its Content-Length; `fields` as in a request's.

    `may_be_json` is true for JSON and without a Content-Type. `is_plain`: only a Content-Length can frame the body.
    """

    __slots__ = (
        "_lines",
        "_more",
        "_selected",
        "content_type",
        "fields",
        "is_plain",
        "keeps_alive",
        "may_be_json",
        "status",
    )

    def __init__(self, status: int, fields: Mapping[bytes, bytes], lines: bytes, *, is_http_1_0: bool) -> None:
        self.status = status
        self.fields = fields
        # RFC 9112 §6.1: in HTTP/1.0 chunks are faulty framing, after which the connection must be closed.
        is_faulty = is_http_1_0 and b"transfer-encoding" in fields
        self.keeps_alive = _keeps_alive(fields, is_http_1_0=is_http_1_0) and not is_faulty
        kind = self.content_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self.may_be_json = kind in (b"", b"application/json") or kind.endswith(b"+json")
        self.is_plain = b"transfer-encoding" not in fields and status not in BODYLESS
        self._lines = _NEVER_TO_CLIENTS.sub(b"", _without_named(lines, fields))
        self._more: tuple[str, ...] | None = None
        self._selected = b""

    def lines_for_clients(self, more: tuple[str, ...] = ()) -> bytes:
        """The header lines to forward to a client. `more` are further names. The last selection is cached."""
        if more is not self._more:
            self._more, self._selected = more, _select(self._lines, (*RESPONSE_HEADERS, *more))
        return self._selected

    def lines_of_stream(self, more: tuple[str, ...] = ()) -> bytes:
        """`lines_for_clients` of an event stream, with headers that keep intermediaries from buffering it."""
        lines = self.lines_for_clients(more)
        if b"x-accel-buffering" not in self.fields:
            lines += b"X-Accel-Buffering: no\r\n"  # for an nginx in front of this server
        said = self.fields.get(b"cache-control", b"no-cache")
        if b"no-transform" in (word.strip() for word in said.lower().split(b",")):
            return lines
        # RFC 9111 §5.2.2.6. Without it, a compressing proxy delays events until its buffer is full.
        return b"%bCache-Control: %b, no-transform\r\n" % (_CACHE_CONTROL.sub(b"", lines), said or b"no-cache")


class AnswerReader:
    """Reads the head of one response as its bytes arrive. Skips interim responses (1xx) before it."""

    __slots__ = ("_heads", "_num_interim", "_unread")

    def __init__(self, heads: Heads[AnswerHead]) -> None:
        self._heads = heads
        self._num_interim = 0
        self._unread = b""

    @property
    def has_part(self) -> bool:
        """Whether an incomplete head has arrived."""
        return bool(self._unread)

    def feed(self, data: bytes) -> tuple[AnswerHead, int | None, bytes] | None:
        """The head, the body's Content-Length and the bytes after the head. None while the head is incomplete.

        Raises `UpstreamError`.
        """
        data = self._unread + data
        while data:
            end = data.find(END_OF_HEAD, 0, MAX_ANSWER_HEAD_BYTES) + len(END_OF_HEAD)
            if end < len(END_OF_HEAD):
                if len(data) >= MAX_ANSWER_HEAD_BYTES:
                    raise UpstreamError("The upstream's answer has too many headers.")
                if not data.startswith(b"HTTP/1."[: len(data)]):
                    raise UpstreamError("The upstream's answer is not HTTP.")
                break
            head, length = self._heads.read(data[:end])
            data = data[end:]
            if head.status >= 200:
                return head, length, data
            self._num_interim += 1
            if head.status == 101:
                raise UpstreamError("The upstream wants another protocol.")
            if self._num_interim > MAX_INTERIM_ANSWERS:
                raise UpstreamError("The upstream sends interim answers and no other.")
        self._unread = data
        return None


class Heads(Generic[H]):
    """Reads heads of one kind, with `read_request` or `read_answer`, and caches recent ones."""

    __slots__ = ("_known", "_read")

    def __init__(self, read: Callable[[bytes], H]) -> None:
        self._read = read
        self._known: dict[bytes, H] = {}

    def read(self, head: bytes) -> tuple[H, int | None]:
        """Read a head up to its empty line. Returns it without the Content-Length, and the Content-Length."""
        match = _LENGTH.search(head)
        if match is None:
            length = None
        else:
            length = int(match[1])
            begin, end = match.span()
            head = head[:begin] + head[end:]
        known = self._known.get(head)
        if known is None:
            known = self._read(head)
            if len(head) <= MAX_REMEMBERED_BYTES:
                if len(self._known) >= MAX_REMEMBERED:
                    self._known.clear()
                self._known[head] = known
        return known, length


def with_own_idempotency_key(lines: bytes, key: bytes, tenant: str) -> bytes:
    """The lines with an `Idempotency-Key` that no other tenant can send, since an upstream sees one API key for all.

    Equal keys of one tenant stay equal, also through another proxy.
    """
    digest = hashlib.sha256(b"%b\n%b" % (tenant.encode(), key)).hexdigest()
    return _IDEMPOTENCY_KEY.sub(b"", lines) + b"Idempotency-Key: %b\r\n" % digest.encode()


def read_request(head: bytes) -> RequestHead | None:
    """A request's head without its Content-Length; None if it is malformed or unusual."""
    match = _REQUEST.fullmatch(head)
    if match is None:
        return None
    method, target, minor, lines = match.groups()
    fields = read_fields(_FIELD.findall(lines))
    if fields is None or b"content-length" in fields or (b"host" not in fields and minor == b"1"):
        return None
    return RequestHead(method, target, fields, lines, is_http_1_0=minor == b"0")


def num_whole_lines_bytes(data: bytes, num_checked: int) -> int | None:
    """The number of bytes of complete lines if `data` can be the beginning of a request's head, else None.

    `num_checked` is the result for a shorter beginning of the same head, or 0.
    """
    end = data.rfind(b"\n") + 1
    if end == 0:
        return 0 if _CUT_FIRST_LINE.fullmatch(data) else None
    is_good = end == num_checked or (_WHOLE_LINES if num_checked else _FIRST_LINES).fullmatch(data, num_checked, end)
    return end if is_good and _CUT_LINE.fullmatch(data, end) else None


def read_answer(head: bytes) -> AnswerHead:
    """A response's head without its Content-Length. Raises `UpstreamError`."""
    match = _ANSWER.fullmatch(head)
    if match is None:
        raise UpstreamError("The upstream's answer is not HTTP.")
    minor, status, lines = match.groups()
    fields = read_fields(_FIELD.findall(lines))
    if fields is None or b"content-length" in fields:
        raise UpstreamError("The upstream's answer has headers that contradict each other, or too many.")
    return AnswerHead(int(status), fields, lines, is_http_1_0=minor == b"0")


def read_fields(found: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes] | None:
    """The fields by name. None if there are too many, or if a field of `_ONCE_ONLY` is repeated."""
    fields: dict[bytes, bytes] = {}
    num_fields = 0
    for name, value in found:
        name = name.lower()
        num_fields += 1
        if name not in fields:
            fields[name] = value
        elif name in _ONCE_ONLY:
            return None
        else:
            fields[name] += b", " + value
    return fields if num_fields <= MAX_HEADERS else None


def is_forwardable(path: bytes) -> bool:
    """Whether a POST to this path has a JSON body that names a model. The path must have its usual spelling."""
    return path.partition(b"?")[0] in FORWARDED_PATHS


def stored_response_id(head: RequestHead) -> str | None:
    """The id of the stored response that a request names. None for other requests."""
    found = _STORED.fullmatch(head.target)
    return found[1].decode() if found is not None and head.method in _STORED_METHODS[found[2]] else None


def usual_spelling(path: bytes) -> bytes:
    """A forwarded path with `/v1`, without doubled or trailing slashes and needless escapes. Others are unchanged."""
    path, mark, query = path.partition(b"?")
    plain = _NEEDLESS_ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()), path)
    spelt = b"/" + b"/".join(part for part in plain.split(b"/") if part)
    known = (each for each in (spelt, b"/v1" + spelt) if each in FORWARDED_PATHS or _STORED.fullmatch(each))
    return next(known, path) + mark + query


def without_limits(lines: bytes) -> bytes:
    """A response's lines without the upstream's rate limits: the client gets those of its API key instead."""
    return _LIMITS.sub(b"", lines)


def status_line(status: int) -> bytes:
    """The status line, such as `HTTP/1.1 200 OK` and CR LF. The upstream's reason phrase is not forwarded."""
    return _REASONS.get(status) or b"HTTP/1.1 %d \r\n" % status


def field_text(value: bytes | None) -> str | None:
    """A header's value, decoded as aiohttp decodes it."""
    return None if value is None else value.decode("utf-8", "surrogateescape")


def _select(lines: bytes, names: tuple[str, ...]) -> bytes:
    """The header lines with these names, unchanged. A name that ends in `*` is a prefix."""
    return b"".join(_pattern_of(names).findall(lines))


def _keeps_alive(fields: Mapping[bytes, bytes], *, is_http_1_0: bool) -> bool:
    """Whether the connection may be used again after this message."""
    wish = fields.get(b"connection", b"").lower()
    return b"keep-alive" in wish if is_http_1_0 else b"close" not in wish


def _without_named(lines: bytes, fields: Mapping[bytes, bytes]) -> bytes:
    """The lines without the headers that the `Connection` header names (hop-by-hop)."""
    wish = fields.get(b"connection")
    if wish is None or wish.lower() in (b"keep-alive", b"close"):
        return lines
    names = {name.strip() for name in wish.lower().split(b",")}
    return b"".join(line for line in lines.splitlines(keepends=True) if line.partition(b":")[0].lower() not in names)


def forwarded_lines(mode: Forwarded, peer: str | None, fields: Mapping[bytes, bytes]) -> bytes:
    """`X-Forwarded-For`, `Forwarded` (RFC 7239) and `X-Real-IP` for a request from this peer with these header fields.

    Values from the client are dropped, except with "append", which is for a proxy behind a trusted one. Empty if the
    peer has no IP address.
    """
    address = _address(peer)
    if mode == "off" or address is None:
        return b""
    node = f'"[{address}]"' if address.version == 6 else str(address)
    values = {b"X-Forwarded-For": str(address).encode(), b"Forwarded": f"for={node}".encode()}
    real_ip = str(address).encode()
    if mode == "append":
        for name, value in values.items():
            claimed = fields.get(name.lower(), b"")
            if 0 < len(claimed) <= MAX_CLAIM_BYTES:
                values[name] = b"%b, %b" % (claimed, value)
        claimed_ip = _address(fields.get(b"x-real-ip", b"").decode("latin-1"))
        real_ip = real_ip if claimed_ip is None else str(claimed_ip).encode()
    values[b"X-Real-IP"] = real_ip
    return b"".join(b"%b: %b\r\n" % item for item in values.items())


def _address(text: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    # A dual-stack socket shows an IPv4 peer as ::ffff:192.0.2.1.
    return getattr(address, "ipv4_mapped", None) or address

"""An upstream's response that is not an event stream: buffered, so that clients never get half of one.

A complete response is checked: a request for JSON gets JSON, else an error that describes the upstream's response. A
refusal (4xx, 501, 503) keeps its status; a body that is not JSON becomes the message of our error envelope. Responses
longer than the buffer, and other media such as audio, are relayed as they arrive. Does no I/O.
"""

from __future__ import annotations

import html
import re
from http import HTTPStatus

import msgspec

from brlite.errors import RequestError, UpstreamError
from brlite.http.errors import foreign_error_body
from brlite.proxy.outcomes import REFUSALS, is_answer
from brlite.proxy.usage import TAIL_BYTES, Seen, usage_in_tail
from brlite.proxy.wire.framing import LAST_CHUNK, Body, CloseBody, FramingError, LengthBody, body_of
from brlite.proxy.wire.heads import BODYLESS, AnswerHead

PAGES = (b"text/html", b"text/plain")
MAX_PAGE_BYTES = 4096  # the first bytes of a page, searched for an error's text
MAX_MESSAGE_CHARACTERS = 500  # of that error text

_JSON = msgspec.json.Decoder(msgspec.Raw)
_MARKUP = re.compile(r"<(?:script|style)\b[^>]*>[^<]*|<!--[^>]*>|<[^<>]*>", re.IGNORECASE)


def body_of_answer(head: AnswerHead, length: int | None) -> Body:
    """How the response's body is framed. Raises `FramingError`."""
    if head.status in BODYLESS:
        return LengthBody(0)
    return body_of(head.fields, length, without=CloseBody())


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """What a client gets in place of a response that is not JSON: header lines and a body."""

    lines: bytes
    body: bytes


def check_response(head: AnswerHead, payload: bytes, path: str) -> Envelope | None:
    """Check a complete response to a request to `path`. None: it is sent unchanged.

    An envelope is for a refusal that is not JSON, such as a proxy's page for 413. Raises `UpstreamError` for a response
    that a client cannot use.
    """
    status, kind = head.status, head.content_type
    if status in BODYLESS or b"content-encoding" in head.fields:
        return None
    if 300 <= status < 400:
        raise UpstreamError(f"The upstream answered {status}: redirects are not followed.")
    if not head.may_be_json and status < 400:
        if kind in PAGES:
            raise UpstreamError(f"The upstream answered {status} with a page in place of JSON.")
        return None
    try:
        _JSON.decode(payload)
        payload.isascii() or payload.decode()
        return None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _envelope(head, payload, path)


def _envelope(head: AnswerHead, payload: bytes, path: str) -> Envelope:
    """The envelope of a refusal that is not JSON. Raises `UpstreamError` for any other response."""
    status = head.status
    if status < 400 or not (is_answer(status) or status in REFUSALS):
        raise UpstreamError(f"The upstream answered {status} with what is not JSON.")
    lines = b"Content-Type: application/json\r\n"
    if retry_after := head.fields.get(b"retry-after"):
        lines += b"Retry-After: %b\r\n" % retry_after

    page = _MARKUP.sub(" ", payload[:MAX_PAGE_BYTES].decode("utf-8", "replace"))
    words = " ".join(html.unescape(page).split())
    text = "".join(character for character in words if character.isprintable())[:MAX_MESSAGE_CHARACTERS]
    if not text:
        known = {each.value for each in HTTPStatus}
        text = HTTPStatus(status).phrase if status in known else "no reason was given"
    return Envelope(lines, foreign_error_body(status, f"The upstream answered {status}: {text}", path))


class BufferedResponse:
    """The part of one response's body that has arrived."""

    __slots__ = ("_arrived", "_body", "num_bytes")

    def __init__(self, body: Body) -> None:
        self._body = body
        self._arrived = bytearray()  # no list: an object for each piece would take 30 times the bytes of small ones
        self.num_bytes = 0

    @property
    def is_done(self) -> bool:
        return self._body.is_done

    @property
    def has_excess(self) -> bool:
        return bool(self._body.excess)

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises `FramingError`."""
        payload = self._body.feed(data)
        self._arrived += payload
        self.num_bytes += len(payload)

    def feed_eof(self) -> None:
        """Handle the end of the connection. Raises `FramingError` if the body is incomplete."""
        self._body.feed_eof()

    def take(self) -> bytes:
        """The payload since the last call."""
        payload, self._arrived = bytes(self._arrived), bytearray()
        return payload


class BodyRelay:
    """Relays a response's body as it arrives. Has the methods of `SseRelay`, but can send no error event."""

    __slots__ = ("_buffered", "_is_chunked", "_tail", "error")

    can_take_event = False

    def __init__(self, buffered: BufferedResponse, *, is_chunked: bool) -> None:
        self._buffered = buffered
        self._is_chunked = is_chunked  # whether the client gets the body in chunks
        self._tail = b""  # the last relayed bytes, which may contain the usage
        self.error: str | None = None

    @property
    def is_done(self) -> bool:
        return self._buffered.is_done

    @property
    def has_excess(self) -> bool:
        return self._buffered.has_excess

    @property
    def seen(self) -> Seen:
        return Seen(usage_in_tail(self._tail), num_text_bytes=self._buffered.num_bytes)

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the response. Returns the bytes to send to the client."""
        try:
            self._buffered.feed(data)
        except FramingError as error:
            self.error = str(error)
            return b""
        return self._taken()

    def feed_eof(self) -> bytes:
        """Handle the end of the upstream's connection. Returns the bytes to send to the client."""
        try:
            self._buffered.feed_eof()
        except FramingError as error:
            self.error = str(error)
            return b""
        return self._taken()

    def end_if_whole(self) -> bytes | None:
        """None: only the framing ends such a body."""
        return None

    def comment(self) -> bytes:
        """b"": such a body has no comments."""
        return b""

    def error_event(self, error: RequestError) -> bytes:
        raise TypeError("a body that is no event stream takes no event")

    def _taken(self) -> bytes:
        part = self._buffered.take()
        self._tail = (self._tail + part[-TAIL_BYTES:])[-TAIL_BYTES:]
        if not self._is_chunked:
            return part
        framed = b"%x\r\n%b\r\n" % (len(part), part) if part else b""
        return framed + LAST_CHUNK if self._buffered.is_done else framed

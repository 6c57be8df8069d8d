"""An upstream's answer that is no stream: kept until it is whole, so that half of one is never passed on.

What came whole is looked at once: a client gets JSON where it asked for JSON, or an error that says what came instead.
A refusal (4xx, 501, 503) keeps its status; words that are no JSON go into our envelope. Knows no sockets.
"""

from __future__ import annotations

import html
import re
from http import HTTPStatus
from typing import NamedTuple

import msgspec

from brlite.errors import UpstreamError
from brlite.http.errors import foreign_error_body
from brlite.proxy.outcomes import REFUSALS, is_answer
from brlite.proxy.usage import TAIL_BYTES
from brlite.proxy.wire.framing import Body, CloseBody, LengthBody, body_of
from brlite.proxy.wire.heads import AnswerHead

BODYLESS = (204, 304)
PAGES = (b"text/html", b"text/plain")
MAX_WORDS_BYTES = 4096  # of a page that are looked at for an error's text
MAX_WORDS = 500  # characters of it that a client gets

_JSON = msgspec.json.Decoder(msgspec.Raw)
_MARKUP = re.compile(r"<(?:script|style)\b[^>]*>[^<]*|<!--[^>]*>|<[^<>]*>", re.IGNORECASE)


def body_of_answer(head: AnswerHead, length: int | None) -> Body:
    """How the answer's body is framed. Raises `Misframed`."""
    if head.status in BODYLESS:
        return LengthBody(0)
    return body_of(head.fields, length, without=CloseBody())


def is_other_media(head: AnswerHead) -> bool:
    """Whether it is a good answer of a kind that is not looked at, such as speech: there is no sense in keeping it."""
    kind = head.content_type
    return head.status == 200 and not _may_be_json(kind) and kind not in PAGES


class WholeResponse(NamedTuple):
    """What a client gets: header lines that are about the body, where not the upstream's own, and the body."""

    body: bytes
    lines: bytes | None = None


class BufferedResponse:
    """The body of one answer as far as it has come."""

    __slots__ = ("_body", "_head", "_parts", "num_bytes", "tail")

    def __init__(self, head: AnswerHead, body: Body) -> None:
        self._head = head
        self._body = body
        self._parts: list[bytes] = []
        self.num_bytes = 0
        self.tail = b""  # the last of what `take` gave

    @property
    def is_done(self) -> bool:
        return self._body.is_done

    @property
    def has_excess(self) -> bool:
        return bool(self._body.excess)

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises `Misframed`."""
        payload = self._body.feed(data)
        self._parts.append(payload)
        self.num_bytes += len(payload)

    def feed_eof(self) -> None:
        """The upstream's connection has ended. Raises `Misframed` if the answer has not."""
        self._body.feed_eof()

    def take(self) -> bytes:
        """What has come since this was asked last."""
        payload, self._parts = b"".join(self._parts), []
        self.tail = (self.tail + payload[-TAIL_BYTES:])[-TAIL_BYTES:]
        return payload

    def whole(self) -> WholeResponse:
        """All of the body, looked at. Raises `UpstreamError` if it is not what a client can use."""
        payload = self.take()
        head = self._head
        if head.status in BODYLESS or b"content-encoding" in head.fields:
            return WholeResponse(payload)
        if 300 <= head.status < 400:
            raise UpstreamError(f"The upstream answered {head.status}: redirects are not followed.")
        kind = head.content_type
        if _may_be_json(kind) or head.status >= 400:
            if not _is_json(payload):
                return self._in_our_envelope(payload)
        elif kind in PAGES:
            raise UpstreamError(f"The upstream answered {head.status} with a page in place of JSON.")
        return WholeResponse(payload)

    def _in_our_envelope(self, payload: bytes) -> WholeResponse:
        """The words of a refusal, such as a proxy's page that says 413 or 503. Raises as `whole` does."""
        status = self._head.status
        if status < 400 or not (is_answer(status) or status in REFUSALS):
            raise UpstreamError(f"The upstream answered {status} with what is not JSON.")
        lines = b"Content-Type: application/json; charset=utf-8\r\n"
        if retry_after := self._head.fields.get(b"retry-after"):
            lines += b"Retry-After: %b\r\n" % retry_after
        text = _words_of(payload) or _phrase_of(status)
        return WholeResponse(foreign_error_body(status, f"The upstream answered {status}: {text}"), lines)


def _may_be_json(content_type: bytes) -> bool:
    return content_type in (b"", b"application/json") or content_type.endswith(b"+json")


def _is_json(payload: bytes) -> bool:
    try:
        _JSON.decode(payload)
        payload.isascii() or payload.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _words_of(payload: bytes) -> str:
    """The text of a page, without its markup, in one line."""
    text = _MARKUP.sub(" ", payload[:MAX_WORDS_BYTES].decode("utf-8", "replace"))
    words = " ".join(html.unescape(text).split())
    return "".join(character for character in words if character.isprintable())[:MAX_WORDS]


def _phrase_of(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no reason was given"

"""An upstream's answer that is no stream: kept until it is whole, so that half of one is never passed on.

What came whole is looked at once: a client gets JSON where it asked for JSON, or an error that says what came instead.
Knows no sockets.
"""

from __future__ import annotations

import msgspec

from brlite.errors import UpstreamError
from brlite.proxy.framing import Body, CloseBody, LengthBody, body_of
from brlite.proxy.heads import AnswerHead

BODYLESS = (204, 304)
PAGES = (b"text/html", b"text/plain")

_JSON = msgspec.json.Decoder(msgspec.Raw)


def body_of_answer(head: AnswerHead, length: int | None) -> Body:
    """How the answer's body is framed. Raises `Misframed`."""
    if head.status in BODYLESS:
        return LengthBody(0)
    return body_of(head.fields, length, without=CloseBody())


def is_other_media(head: AnswerHead) -> bool:
    """Whether it is a good answer of a kind that is not looked at, such as speech: there is no sense in keeping it."""
    kind = head.content_type
    return head.status == 200 and not _may_be_json(kind) and kind not in PAGES


class HeldAnswer:
    """The body of one answer as far as it has come."""

    __slots__ = ("_body", "_head", "_parts", "num_bytes")

    def __init__(self, head: AnswerHead, body: Body) -> None:
        self._head = head
        self._body = body
        self._parts: list[bytes] = []
        self.num_bytes = 0

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
        return payload

    def whole(self) -> bytes:
        """All of the body, looked at. Raises `UpstreamError` if it is not what a client can use."""
        payload = self.take()
        head = self._head
        if head.status in BODYLESS or b"content-encoding" in head.fields:
            return payload
        if 300 <= head.status < 400:
            raise UpstreamError(f"The upstream answered {head.status}: redirects are not followed.")
        kind = head.content_type
        if _may_be_json(kind) or head.status >= 400:
            _check_json(payload, head.status)
        elif kind in PAGES:
            raise UpstreamError(f"The upstream answered {head.status} with a page in place of JSON.")
        return payload


def _may_be_json(content_type: bytes) -> bool:
    return content_type in (b"", b"application/json") or content_type.endswith(b"+json")


def _check_json(payload: bytes, status: int) -> None:
    try:
        _JSON.decode(payload)
        payload.isascii() or payload.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UpstreamError(f"The upstream answered {status} with what is not JSON.") from None

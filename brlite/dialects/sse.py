"""The text of server-sent events: one frame for each event, and the event that ends OpenAI's streams."""

from __future__ import annotations

DONE = b"[DONE]"
EVENT_END = b"\n\n"
DONE_EVENT = b"data: %b\n\n" % DONE
# Characters that Python's `str.splitlines` takes for line ends, as clients that are built on it do, and JSON does not.
_LINE_ENDS = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\x85".encode(), b"\\u0085"),
)


def on_one_line(event: bytes) -> bytes:
    """JSON whose line separators are escaped, so that it is one line in every reader's eyes."""
    if not event.isascii():
        for character, escape in _LINE_ENDS:
            event = event.replace(character, escape)
    return event


def frame(event: bytes, name: str = "") -> bytes:
    """A server-sent event with this JSON as its data. Without a name it has no `event:` line."""
    data = b"data: %b\n\n" % (event if event.isascii() else on_one_line(event))
    return b"event: %b\n%b" % (name.encode(), data) if name else data

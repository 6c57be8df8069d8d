"""Frames server-sent events, and defines the event that ends OpenAI's streams."""

from __future__ import annotations

DONE = b"[DONE]"
EVENT_END = b"\n\n"
DONE_EVENT = b"data: %b\n\n" % DONE
# Characters that `str.splitlines`, and so some Python clients, treat as line ends. JSON does not escape them.
_LINE_ENDS = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\x85".encode(), b"\\u0085"),
)


def on_one_line(event: bytes) -> bytes:
    """JSON with escaped line separators, so that every client reads it as one line."""
    for character, escape in _LINE_ENDS:
        event = event.replace(character, escape)
    return event


def frame(event: bytes, name: str = "") -> bytes:
    """A server-sent event with this JSON as its data. Without `name` it has no `event:` line."""
    data = b"data: %b\n\n" % (event if event.isascii() else on_one_line(event))
    return b"event: %b\n%b" % (name.encode(), data) if name else data

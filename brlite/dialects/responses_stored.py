"""Responses as they are stored."""

from __future__ import annotations

from msgspec import Raw, Struct

from brlite.dialects.kept_events import KeptEvents, decompressed_events
from brlite.errors import InvalidRequest

NOT_KEPT = "the events of this response were not kept: the store was full (limits.max_stored_bytes)"


class FinishedResponse(Struct, frozen=True):
    """A response: the `body` as sent, the items before it, and its own items by id.

    `stream` has its events, compressed, also if the response was not streamed; it is empty if they were not kept. While
    a background response `is_running`, it has neither output nor events here.
    """

    id: str
    body: bytes
    input: tuple[Raw, ...]
    output: dict[str, Raw]
    stream: bytes = b""
    is_background: bool = False
    is_running: bool = False

    def events(self, num_seen: int) -> bytes:
        """The stream's events without the first `num_seen`. It takes 1 ms for 250 KB.

        Raises `InvalidRequest` if the stream has fewer, or was not kept.
        """
        if not self.stream:
            raise _not_kept()
        events = decompressed_events(self.stream)
        _check_num_seen(num_seen, len(events))
        return b"".join(events[num_seen:])


def check_following(kept: KeptEvents, num_seen: int) -> None:
    """Raise `InvalidRequest` if a running response has fewer than `num_seen` events, or if they were dropped."""
    _check_num_seen(num_seen, kept.num_events)
    if kept.is_dropped:
        raise _not_kept()


def _check_num_seen(num_seen: int, num_events: int) -> None:
    if num_seen > num_events:
        text = f"starting_after is {num_seen - 1}; this response's events are numbered 0 to {num_events - 1}"
        raise InvalidRequest(text, param="starting_after")


def _not_kept() -> InvalidRequest:
    return InvalidRequest(NOT_KEPT, param="stream", code="stream_not_resumable")

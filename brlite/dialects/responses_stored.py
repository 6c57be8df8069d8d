"""Responses as they are stored."""

from __future__ import annotations

from msgspec import Raw, Struct

from brlite.dialects.kept_events import KeptEvents
from brlite.errors import InvalidRequest

NOT_KEPT = "the events of this response were not kept: the store was full (limits.max_stored_bytes)"


class FinishedResponse(Struct, frozen=True):
    """A response: the `body` as sent, the items before it, and its own items by id.

    `kept` has its events, also if the response was not streamed; None if they were not kept. While a background
    response `is_running`, it has neither output nor events here.
    """

    id: str
    body: bytes
    input: tuple[Raw, ...]
    output: dict[str, Raw]
    kept: KeptEvents | None = None
    is_background: bool = False
    is_running: bool = False


def check_following(kept: KeptEvents | None, num_seen: int) -> KeptEvents:
    """The events of a response. Raises `InvalidRequest` if it has fewer than `num_seen` so far, or were not kept."""
    if kept is not None and num_seen > kept.num_events:
        text = f"starting_after is {num_seen - 1}; this response's events are numbered 0 to {kept.num_events - 1}"
        raise InvalidRequest(text, param="starting_after")
    if kept is None or kept.is_dropped:
        raise InvalidRequest(NOT_KEPT, param="stream", code="stream_not_resumable")
    return kept

"""A stream that outlives its client: its events are recorded, and each client gets those that it has not seen.

The first request asks for this with `Last-Event-ID: 0` beside its `Idempotency-Key`; a later one says the number of the
last event that it got. Events count from 1. A stream without the header goes straight to its client and ends with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.dialects.sse import EVENT_END
from brlite.errors import InvalidRequest
from brlite.http.events import EventStream

HEADER = "Last-Event-ID"
MAX_DIGITS = 9


class RecordedStream:
    """What a delivery writes to in place of its client's `EventStream`. `follow` sends it to a client, as it grows."""

    is_backlogged = False

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self._has_begun = self._is_over = False
        self._changed = asyncio.get_running_loop().create_future()

    async def prepare(self) -> None:
        self._has_begun = True
        self._notify()

    def write(self, events: bytes) -> bool:
        self.events += split_events(events)
        self._notify()
        return True

    @contextmanager
    def telling(self, what: Callable[[], str], seconds: float) -> Iterator[None]:
        """Comments are the clients' own: nothing is recorded."""
        yield

    async def drained(self, seconds: float) -> bool:
        return True

    async def finish(self, last_events: bytes = b"") -> web.StreamResponse:
        self.write(last_events)
        self.close()
        return web.StreamResponse()

    def close(self) -> None:
        """Nothing more comes. May be called twice, and before `prepare`."""
        self._is_over = True
        self._notify()

    async def begun(self) -> bool:
        """Whether there is a stream; False: its request was refused before the first event."""
        while not self._has_begun and not self._is_over:
            await asyncio.shield(self._changed)
        return self._has_begun

    async def follow(self, request: web.Request, num_seen: int, limits: LimitsConfig) -> web.StreamResponse:
        """Send the events behind the first `num_seen`, with their numbers, to the end or until the client leaves.

        Raises `InvalidRequest` if there are not so many.
        """
        check_num_seen(num_seen, len(self.events))
        async with EventStream(request, limits.sse_comment_seconds) as stream:
            while not self._is_over or num_seen < len(self.events):
                if num_seen == len(self.events):
                    await asyncio.shield(self._changed)
                    continue
                events = numbered(self.events, num_seen)
                num_seen = len(self.events)
                if not stream.write(events) or not await stream.drained(limits.slow_client_seconds):
                    break
            return await stream.finish()

    def _notify(self) -> None:
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()


RECORDED = web.RequestKey("recorded", RecordedStream)  # where the events of a request go, if not to its client


def last_event_id(request: web.Request) -> int | None:
    """How many events the client has, if it says so. Raises `InvalidRequest`."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise InvalidRequest(
            f"{HEADER} must be the id of the last event that came, or 0, got {text[:64]!r}", param=HEADER
        )
    return int(text)


def split_events(stream: bytes) -> list[bytes]:
    """The complete events of a stream's text, each with its end."""
    return [event + EVENT_END for event in stream.split(EVENT_END)[:-1]]


def numbered(events: Sequence[bytes], num_seen: int) -> bytes:
    """The events behind the first `num_seen`, each with its number as its id."""
    behind = enumerate(events[num_seen:], num_seen + 1)
    return b"".join(b"id: %d\n%b" % (number, event) for number, event in behind)


def check_num_seen(num_seen: int, num_events: int) -> None:
    if num_seen > num_events:
        raise InvalidRequest(f"{HEADER} is {num_seen}; the stream has {num_events} events so far", param=HEADER)


def not_resumable() -> InvalidRequest:
    return InvalidRequest(
        f"This stream cannot be resumed: it failed, was aborted or is forgotten. Begin anew with {HEADER}: 0.",
        param=HEADER,
        code="stream_not_resumable",
    )

"""A stream that continues when its client disconnects. Its events are kept; a client gets those not yet received.

A background response has such a stream (`background.py`). Any other one gets it by `Last-Event-ID: 0` and an
`Idempotency-Key`; a later request sends the number of the last event that it received. Events count from 1. Without the
header a stream ends with its client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from aiohttp import hdrs, web

from brlite.config.options import LimitsConfig
from brlite.dialects.kept_events import EventReader, KeptEvents
from brlite.errors import InvalidRequest
from brlite.http.events import EventStream

HEADER = "Last-Event-ID"
MAX_DIGITS = 9  # of an event's number


class RecordedStream:
    """A stream that does not belong to a client. Its encoder keeps the events, and any number of clients follow them.

    It has the methods of `EventStream`, for the delivery that writes it. It neither waits for clients nor ends with
    them.
    """

    is_backlogged = False
    is_clear = True

    def __init__(self) -> None:
        self.kept: KeptEvents | None = None  # until it has an encoder
        self._has_begun = self._is_over = False
        self._changed = asyncio.get_running_loop().create_future()

    def keep(self, kept: KeptEvents) -> None:
        """Set where the encoder keeps the events. Call it before the first one."""
        self.kept = kept
        self._notify()

    async def prepare(self) -> None:
        self._has_begun = True
        self._notify()

    def write(self, events: bytes) -> bool:
        """Wake the clients: the encoder has kept these events."""
        self._notify()
        return True

    append = write

    @contextmanager
    def commenting(self, what: Callable[[], str], seconds: float) -> Iterator[None]:
        """Does nothing: comments are not recorded. `follow` sends its own."""
        yield

    async def drained(self, seconds: float) -> bool:
        return True

    async def finish(self, last_events: bytes = b"") -> web.StreamResponse:
        if self.kept is None:
            self.kept = KeptEvents()
        if not self.kept.num_events:  # the request was refused before it had an encoder
            self.kept.add(last_events)
        self._notify()
        return web.StreamResponse()

    def close(self) -> None:
        """Does nothing: an event may follow when the delivery has ended. `end` follows."""

    def end(self) -> None:
        """No event follows. May be called before `prepare`."""
        self._is_over = True
        self._notify()

    async def begun(self) -> bool:
        """Wait until the stream has begun: True. False if its request was refused before the first event."""
        while not self._has_begun and not self._is_over:
            await asyncio.shield(self._changed)
        return self._has_begun

    async def follow(
        self,
        request: web.Request,
        num_seen: int,
        limits: LimitsConfig,
        *,
        has_ids: bool,
        headers: Mapping[str, str] | None = None,
    ) -> web.StreamResponse:
        """Send the events after the first `num_seen` as they come, until the last one or until the client leaves.

        With `has_ids` each event has its number. If a client reads so slowly that its next event is dropped meanwhile,
        its connection is cut.
        """
        async with EventStream(request, limits.sse_comment_seconds, headers) as stream:
            if request.method == hdrs.METH_HEAD:
                return await stream.finish()  # its response ends with the headers
            while self.kept is None and not self._is_over:
                await asyncio.shield(self._changed)
            reader = None if self.kept is None else EventReader(self.kept, num_seen)
            while reader is not None:
                if reader.is_late:
                    stream.abort()
                    break
                events = reader.read()
                if events is None and self._is_over:
                    break
                if events is None:
                    await asyncio.shield(self._changed)
                    continue
                data = numbered(events, num_seen) if has_ids else b"".join(events)
                num_seen += len(events)
                if data and not (stream.write(data) and await stream.drained(limits.slow_client_seconds)):
                    break
                await asyncio.sleep(0)  # decompressing a long history takes a while
            return await stream.finish()

    def _notify(self) -> None:
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()


RECORDED = web.RequestKey("recorded", RecordedStream)  # where the events of a request are recorded


def last_event_id(request: web.Request) -> int | None:
    """The number in the `Last-Event-ID` header: how many events the client has. Raises `InvalidRequest`."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise InvalidRequest(
            f"{HEADER} must be the id of the last event that came, or 0, got {text[:64]!r}", param=HEADER
        )
    return int(text)


def numbered(events: Sequence[bytes], num_before: int) -> bytes:
    """The events with their numbers as ids; the first number is `num_before` + 1."""
    return b"".join(b"id: %d\n%b" % (number, event) for number, event in enumerate(events, num_before + 1))


def check_num_seen(num_seen: int, num_events: int) -> None:
    if num_seen > num_events:
        raise InvalidRequest(f"{HEADER} is {num_seen}; the stream has {num_events} events so far", param=HEADER)


def not_resumable() -> InvalidRequest:
    return InvalidRequest(
        f"This stream cannot be resumed: it failed, was aborted or is forgotten. Begin anew with {HEADER}: 0.",
        param=HEADER,
        code="stream_not_resumable",
    )

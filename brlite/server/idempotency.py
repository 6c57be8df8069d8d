"""`Idempotency-Key`: a repeated request waits for the first one while that runs, and later gets the stored answer.

An answer that is not streamed is computed to its end even if its client disconnects. A stream ends when its client
disconnects, and the next request with the key starts again, unless it can be resumed (`resumable.py`). Only complete
answers are stored: no errors and no aborted answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from msgspec import Raw, Struct

from brlite.config.options import LimitsConfig
from brlite.dialects.dialect import Dialect, ResponseEncoder
from brlite.dialects.event import Event, TokenUsage
from brlite.dialects.generation import Generation
from brlite.dialects.json_body import decode_fields
from brlite.dialects.kept_events import STATE_BYTES, KeptEvents
from brlite.errors import BrliteError, InvalidRequest
from brlite.http.body import HELD
from brlite.http.bounded_store import OBJECT_BYTES, BoundedStore
from brlite.server.resumable import RECORDED, RecordedStream, check_num_seen, last_event_id, not_resumable

logger = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
REPLAYED = {"Idempotent-Replayed": "true"}
MAX_KEY_LENGTH = 255
CLOSE_SECONDS = 1.0

Run = Callable[[Dialect, web.Request], Awaitable[web.StreamResponse]]


class StoredAnswer(Struct, frozen=True):
    """`digest` is the digest of the request. Requests with the same key must have the same digest.

    The `body` of a stream is its events. An answer that is being streamed is stored without a body, for its size.
    """

    digest: bytes
    body: bytes | KeptEvents = b""

    async def send(self, request: web.Request, num_seen: int | None, limits: LimitsConfig) -> web.StreamResponse:
        """The whole answer, or the events after the first `num_seen`. Raises `InvalidRequest` if it has fewer."""
        if not isinstance(self.body, KeptEvents):
            return web.Response(body=self.body, content_type="application/json", headers=REPLAYED)
        check_num_seen(num_seen or 0, self.body.num_events)
        stream = RecordedStream()  # events are decompressed as the client reads them
        stream.keep(self.body)
        stream.end()
        return await stream.follow(request, num_seen or 0, limits, has_ids=num_seen is not None, headers=REPLAYED)


class RunningAnswer:
    """The result of `answer` is None if the answer did not become complete. `stream` is set if it can be resumed."""

    def __init__(self, place: tuple[str, str], digest: bytes, stream: RecordedStream | None) -> None:
        self.place = place  # tenant and key
        self.digest = digest
        self.stream = stream
        self.answer: asyncio.Future[StoredAnswer | None] = asyncio.get_running_loop().create_future()


class IdempotentAnswers:
    """The answers of requests with a key: running ones, and complete ones up to a number of bytes."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.store: BoundedStore[StoredAnswer] = BoundedStore(
            limits.max_idempotent_bytes, name="max_idempotent_bytes", what="answers for retries"
        )
        self._limits = limits
        self._running: dict[tuple[str, str], RunningAnswer] = {}
        self._tasks: set[asyncio.Task[web.StreamResponse]] = set()

    async def answer(
        self, dialect: Dialect, request: web.Request, body: bytes, tenant: str, run: Run
    ) -> web.StreamResponse:
        """The answer of `run`, or of an equal request that is complete or running. Raises as `run` does.

        Raises `InvalidRequest` if the key was used with another body or path, or if the stream cannot be resumed.
        """
        key = request.headers[HEADER]
        if not 0 < len(key) <= MAX_KEY_LENGTH:
            raise InvalidRequest(f"{HEADER} must have 1 to {MAX_KEY_LENGTH} characters, got {len(key)}", param=HEADER)
        is_streamed = bytes(decode_fields(body).get("stream", Raw(b"false"))) == b"true"
        num_seen = last_event_id(request) if is_streamed else None
        digest = hashlib.sha256(dialect.path.encode() + b"\n" + body).digest()
        earlier = await self._earlier(request, tenant, digest, num_seen)
        if earlier is not None:
            return earlier
        if num_seen:
            raise not_resumable()

        kept = KeptEvents() if is_streamed else None
        stream = None if num_seen is None else RecordedStream()
        recorder = RecordingEncoder(dialect.make_encoder, kept)
        recorded = dialect._replace(make_encoder=recorder.make)
        running = self._running[tenant, key] = RunningAnswer((tenant, key), digest, stream)
        if kept is not None:
            self.store.put(tenant, key, StoredAnswer(digest), STATE_BYTES)
            kept.count_with(lambda num: not running.answer.done() and self.store.grow(tenant, key, num))
            if stream is None:
                try:
                    return await run(recorded, request)
                finally:
                    self._end(running, recorder.body)
            stream.keep(kept)
            request[RECORDED] = stream
        task = asyncio.ensure_future(run(recorded, request))
        self._hold(request, running, recorder, task)
        try:
            if stream is None or not await stream.begun():
                return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(log_bug)
            raise
        task.add_done_callback(log_bug)
        return await stream.follow(request, 0, self._limits, has_ids=True)

    def _hold(
        self,
        request: web.Request,
        running: RunningAnswer,
        recorder: RecordingEncoder,
        task: asyncio.Task[web.StreamResponse],
    ) -> None:
        """Let a task compute an answer to its end, also if the client disconnects. Its body counts until then."""
        held, stream = request[HELD].hand_over(), running.stream
        self._tasks.add(task)

        def on_done(task: asyncio.Task[web.StreamResponse]) -> None:
            self._tasks.discard(task)
            held.release()
            has_failed = task.cancelled() or task.exception() is not None
            if stream is not None:
                stream.end()
            self._end(running, None if has_failed else recorder.body)

        task.add_done_callback(on_done)

    async def _earlier(
        self, request: web.Request, tenant: str, digest: bytes, num_seen: int | None
    ) -> web.StreamResponse | None:
        """The answer of an earlier request with this key; None if there is none. Waits for a running request.

        Raises `InvalidRequest` if that request had another digest.
        """
        key = request.headers[HEADER]
        while (running := self._running.get((tenant, key))) is not None:
            _check(running.digest, digest)
            stream = running.stream
            if stream is not None and stream.kept is not None and num_seen is not None and await stream.begun():
                check_num_seen(num_seen, stream.kept.num_events)
                if stream.kept.is_dropped:
                    raise not_resumable()
                return await stream.follow(request, num_seen, self._limits, has_ids=True)
            answer = await asyncio.shield(running.answer)
            if answer is not None:
                return await answer.send(request, num_seen, self._limits)
        stored = self.store.get(tenant, key)
        if stored is None:
            return None
        _check(stored.digest, digest)
        return await stored.send(request, num_seen, self._limits)

    async def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait up to `seconds` for running requests, then cancel them and wait for their ends."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    def settle(self, request: web.Request, tenant: str, body: bytes) -> None:
        """Make this body the answer of a request that goes on running, if it has a key."""
        if (running := self._running.get((tenant, request.headers.get(HEADER, "")))) is not None:
            self._end(running, body)

    def _end(self, running: RunningAnswer, body: bytes | KeptEvents | None) -> None:
        """Store a complete answer. `body` is None if the answer did not become complete."""
        if running.answer.done():
            return  # it was settled
        del self._running[running.place]
        tenant, key = running.place
        answer = None
        if body is None:
            self.store.pop(tenant, key)
        else:
            answer = StoredAnswer(running.digest, body)
            num_bytes = body.num_bytes if isinstance(body, KeptEvents) else len(body)
            self.store.put(tenant, key, answer, num_bytes + len(key) + OBJECT_BYTES)
        running.answer.set_result(answer)


ANSWERS = web.AppKey("answers", IdempotentAnswers)


def log_bug(task: asyncio.Task[web.StreamResponse]) -> None:
    """Log the error of a task that has ended, if it is a bug. For a task that no handler waits for."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, BrliteError):
        logger.error("an answer failed that no client waits for", exc_info=error)


class RecordingEncoder(ResponseEncoder):
    """An encoder that keeps what another one encodes; `make` is its dialect's `make_encoder`.

    `kept` gets the events of a stream. `body` is that of the complete answer, or `kept` if the stream has ended without
    error.
    """

    _encoder: ResponseEncoder  # set by `make`, which is called once

    def __init__(
        self, make_encoder: Callable[[Generation, str, str, str], ResponseEncoder], kept: KeptEvents | None
    ) -> None:
        self._make_encoder = make_encoder
        self._kept = kept
        self._is_aborted = self._may_be_aborted = False
        self.body: bytes | KeptEvents | None = None

    def make(self, call: Generation, answer_id: str, model: str, fingerprint: str) -> ResponseEncoder:
        self._encoder = self._make_encoder(call, answer_id, model, fingerprint)
        self._may_be_aborted = call.make_text_end is not None  # then that is how a complete answer may end
        return self

    def opening(self, usage: TokenUsage) -> bytes:
        return self._keep(self._encoder.opening(usage))

    def encode(self, event: Event) -> bytes:
        self._is_aborted |= self._is_abort(event)
        return self._keep(self._encoder.encode(event))

    def closing(self, usage: TokenUsage) -> bytes:
        data = self._keep(self._encoder.closing(usage))
        if self._kept is not None and not self._is_aborted:
            self.body = self._kept if self._kept.finish() else None  # the store may have had no room for it
        return data

    def failing(self, error: BaseException) -> bytes:
        return self._keep(self._encoder.failing(error))

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        data = self._encoder.whole(events, usage, warnings)
        if not any(map(self._is_abort, events)):
            self.body = data
        return data

    def _is_abort(self, event: Event) -> bool:
        return event.finish_reason == "abort" and not self._may_be_aborted

    def _keep(self, events: bytes) -> bytes:
        if self._kept is not None:
            self._kept.add(events)
        return events


def _check(before: bytes, now: bytes) -> None:
    if before != now:
        raise InvalidRequest(
            f"this {HEADER} came with another request: a retry must have the same path and the same body",
            param=HEADER,
            code="idempotency_key_reused",
        )

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
from brlite.errors import InvalidRequest
from brlite.http.body import HELD
from brlite.http.bounded_store import OBJECT_BYTES, BoundedStore
from brlite.server.resumable import (
    RECORDED,
    RecordedStream,
    check_num_seen,
    last_event_id,
    not_resumable,
    numbered,
    split_events,
)

logger = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
MAX_KEY_LENGTH = 255
CLOSE_SECONDS = 1.0

Run = Callable[[Dialect, web.Request], Awaitable[web.StreamResponse]]


class StoredAnswer(Struct, frozen=True):
    """`digest` is the digest of the request. Requests with the same key must have the same digest."""

    digest: bytes
    body: bytes
    content_type: str

    def response(self, num_seen: int | None) -> web.Response:
        """The whole answer, or the events after the first `num_seen`. Raises `InvalidRequest` if it has fewer."""
        body = self.body
        if num_seen is not None:
            events = split_events(body)
            check_num_seen(num_seen, len(events))
            body = numbered(events[num_seen:], num_seen)
        return web.Response(body=body, content_type=self.content_type, headers={"Idempotent-Replayed": "true"})


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

        recorder = RecordingEncoder(dialect.make_encoder, self._limits.max_idempotent_bytes)
        recorded = dialect._replace(make_encoder=recorder.make)
        stream = None if num_seen is None else RecordedStream(self._limits.max_idempotent_bytes)
        running = self._running[tenant, key] = RunningAnswer((tenant, key), digest, stream)
        if is_streamed and stream is None:
            try:
                return await run(recorded, request)
            finally:
                self._end(running, recorder.kept_stream, "text/event-stream")
        if stream is not None:
            request[RECORDED] = stream
        task, held = asyncio.ensure_future(run(recorded, request)), request[HELD].hand_over()
        self._tasks.add(task)

        def on_done(task: asyncio.Task[web.StreamResponse]) -> None:
            self._tasks.discard(task)
            held.release()
            has_failed = task.cancelled() or task.exception() is not None
            if stream is None:
                self._end(running, None if has_failed else recorder.kept_body, "application/json")
            else:
                stream.close()
                self._end(running, recorder.kept_stream, "text/event-stream")

        task.add_done_callback(on_done)
        if stream is not None and await stream.begun():
            return await stream.follow(request, 0, self._limits)
        return await asyncio.shield(task)

    async def _earlier(
        self, request: web.Request, tenant: str, digest: bytes, num_seen: int | None
    ) -> web.StreamResponse | None:
        """The answer of an earlier request with this key; None if there is none. Waits for a running request.

        Raises `InvalidRequest` if that request had another digest.
        """
        key = request.headers[HEADER]
        while (running := self._running.get((tenant, key))) is not None:
            _check(running.digest, digest)
            if running.stream is not None and num_seen is not None and await running.stream.begun():
                return await running.stream.follow(request, num_seen, self._limits)
            answer = await asyncio.shield(running.answer)
            if answer is not None:
                return answer.response(num_seen)
        stored = self.store.get(tenant, key)
        if stored is None:
            return None
        _check(stored.digest, digest)
        return stored.response(num_seen)

    async def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait up to `seconds` for running requests, then cancel them."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()

    def settle(self, request: web.Request, tenant: str, body: bytes) -> None:
        """Make this body the answer of a request that goes on running, if it has a key."""
        if (running := self._running.get((tenant, request.headers.get(HEADER, "")))) is not None:
            self._end(running, body, "application/json")

    def _end(self, running: RunningAnswer, body: bytes | None, content_type: str) -> None:
        """Store a complete answer. `body` is None if the answer did not become complete."""
        if running.answer.done():
            return  # it was settled
        del self._running[running.place]
        tenant, key = running.place
        answer = None
        if body is not None:
            answer = StoredAnswer(running.digest, body, content_type)
            self.store.put(tenant, key, answer, len(body) + len(key) + OBJECT_BYTES)
        running.answer.set_result(answer)


ANSWERS = web.AppKey("answers", IdempotentAnswers)


class RecordingEncoder:
    """An encoder that keeps the bytes of another one, at most `max_bytes`; `make` is its dialect's `make_encoder`.

    `kept_body` is set by `whole`, `kept_stream` once the stream has ended without error.
    """

    _encoder: ResponseEncoder  # set by `make`, which is called once

    def __init__(self, make_encoder: Callable[[Generation, str, str, str], ResponseEncoder], max_bytes: int) -> None:
        self._make_encoder = make_encoder
        self._max_bytes = max_bytes
        self._stream: list[bytes] = []
        self._num_bytes = 0
        self._is_aborted = self._may_be_aborted = False
        self.kept_body: bytes | None = None
        self.kept_stream: bytes | None = None

    def make(self, call: Generation, answer_id: str, model: str, fingerprint: str) -> ResponseEncoder:
        self._encoder = self._make_encoder(call, answer_id, model, fingerprint)
        self._may_be_aborted = call.make_text_end is not None  # then that is how a complete answer may end
        return self

    def opening(self, usage: TokenUsage) -> bytes:
        return self._kept(self._encoder.opening(usage))

    def encode(self, event: Event) -> bytes:
        self._is_aborted |= self._is_abort(event)
        return self._kept(self._encoder.encode(event))

    def closing(self, usage: TokenUsage) -> bytes:
        data = self._kept(self._encoder.closing(usage))
        if not self._is_aborted and self._num_bytes <= self._max_bytes:
            self.kept_stream = b"".join(self._stream)
        return data

    def failing(self, error: BaseException) -> bytes:
        return self._encoder.failing(error)

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        data = self._encoder.whole(events, usage, warnings)
        if not any(map(self._is_abort, events)):
            self.kept_body = data
        return data

    def _is_abort(self, event: Event) -> bool:
        return event.finish_reason == "abort" and not self._may_be_aborted

    def _kept(self, data: bytes) -> bytes:
        self._num_bytes += len(data)
        if self._num_bytes <= self._max_bytes:
            self._stream.append(data)
        elif self._stream:
            self._stream.clear()
            logger.warning(
                "a stream is not kept for retries: it has more than limits.max_idempotent_bytes = %d",
                self._max_bytes,
            )
        return data


def _check(before: bytes, now: bytes) -> None:
    if before != now:
        raise InvalidRequest(
            f"this {HEADER} came with another request: a retry must have the same path and the same body",
            param=HEADER,
            code="idempotency_key_reused",
        )

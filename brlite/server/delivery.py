"""Carries outputs from the engine to one HTTP response: chunk by chunk, or all at once.

A stream whose model has to be loaded begins before the load and reports its progress in comments. The engine's
sinks write to the client's socket themselves, so a token costs one write and wakes no task. A client that is slower
than its model gets merged deltas; one that leaves, in any way, has its requests aborted.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TypeVar

from aiohttp import web

from brlite.config.options import LimitsConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.request import Request
from brlite.errors import BrliteError, EngineError, stopping
from brlite.http.errors import error_body
from brlite.http.events import EventStream
from brlite.http.keys import api_key
from brlite.outputs import RequestOutput
from brlite.server.answers import Answer
from brlite.server.served_model import ServedModel

LOADING_COMMENT_SECONDS = 1.0

C = TypeVar("C", bound="Collector")

# Encodes the prompts and submits the requests to the collector. Encoding a long prompt takes seconds.
Ask = Callable[[EngineLoop, "Collector"], Awaitable[None]]


RUNNING: web.AppKey[set[Collector]] = web.AppKey("running")  # the collectors of the responses in progress
RETRY_SECONDS = 1


def end_all(app: web.Application) -> None:
    """End all responses in progress with an error; a stream gets an error event."""
    for collector in app[RUNNING]:
        collector.fail(stopping(RETRY_SECONDS))


class Collector:
    """The outputs of several requests, merged per request until all are finished.

    `with Collector(answer) as collector:` aborts at the end what is not finished by then, however the end comes, and
    counts what was computed and never sent.
    """

    def __init__(self, answer: Answer) -> None:
        self.outputs: dict[int, RequestOutput] = {}
        self._answer = answer
        self._num_requests = 0
        self._num_open = 0
        self._aborts = ExitStack()
        self._error: BrliteError | None = None
        self._changed = asyncio.Event()

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._aborts.close()
        for index, output in self.outputs.items():
            self._answer.count.add(index, output)

    def submit(self, engine: EngineLoop, requests: Sequence[Request]) -> None:
        """Queue all of them. The first refusal is raised; those before it end with the collector."""
        self._num_requests = self._num_open = len(requests)
        for index, request in enumerate(requests):
            engine.submit(request, functools.partial(self._receive, index))
            self._aborts.callback(engine.abort, request.request_id)

    def fail(self, error: BrliteError) -> None:
        """End with this error in place of what is still to come."""
        self._error = self._error or error
        self._changed.set()

    async def wait(self) -> list[RequestOutput]:
        """All outputs, whole. Raises the error that ended one of the requests."""
        while self._num_open and self._error is None:
            await self._changed.wait()
            self._changed.clear()
        if self._error is not None:
            raise self._error
        outputs, self.outputs = self.outputs, {}
        return [outputs[index] for index in range(self._num_requests)]

    def _receive(self, index: int, output: RequestOutput | BrliteError) -> None:
        try:
            if isinstance(output, BrliteError):
                self._error = output
            else:
                self._num_open -= output.finished
                self._take(index, output)
        except Exception:  # the engine logs it; without an error here the handler would wait for ever
            self._error = EngineError("the answer could not be made")
            raise
        finally:
            if not self._num_open or self._error is not None:
                self._changed.set()

    def _take(self, index: int, output: RequestOutput) -> None:
        if index in self.outputs:
            self.outputs[index].merge(output)
        else:
            self.outputs[index] = output


class StreamCollector(Collector):
    """Sends each delta as it comes; `outputs` holds only what the client is not ready for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._stream: EventStream | None = None
        self._has_left = False

    async def send_to(self, stream: EventStream, slow_client_seconds: float) -> None:
        """Send the stream to its end, or to its error. Returns early if the client left, or was cut for being slow."""
        self._stream = stream
        try:
            self._send(self._answer.opening())
            self._flush()
            while self._num_open and self._error is None and not self._has_left:
                await self._changed.wait()
                self._changed.clear()
                if self.outputs and not await stream.drained(slow_client_seconds):
                    return
                self._flush()
            if self._error is not None:
                stream.send(error_body(self._error))
            else:
                self._send(self._answer.closing())
        finally:
            self._stream = None  # outputs of other prompts must not follow the end of the response

    def _take(self, index: int, output: RequestOutput) -> None:
        super()._take(index, output)
        if self._stream is None or self._stream.is_backlogged:
            self._changed.set()
        else:
            self._flush()

    def _flush(self) -> None:
        outputs, self.outputs = self.outputs, {}
        for index, output in outputs.items():
            self._send(self._answer.chunks(index, output))

    def _send(self, chunks: list[bytes]) -> None:
        assert self._stream is not None
        if chunks and not self._stream.send(*chunks):
            self._has_left = True  # not every server cancels the handler then
            self._changed.set()


async def answer_whole(
    http_request: web.Request, model: ServedModel, ask: Ask, answer: Answer, limits: LimitsConfig
) -> web.Response:
    """Wait for the model and for all completions, and answer with one body."""
    with Collector(answer) as collector, _registered(http_request, collector):
        await ask(await model.loaded(limits.max_wait_seconds, api_key(http_request).tenant), collector)
        body = answer.whole(await collector.wait())
    return web.Response(body=body, content_type="application/json")


async def answer_stream(
    http_request: web.Request, model: ServedModel, ask: Ask, answer: Answer, limits: LimitsConfig
) -> web.StreamResponse:
    """Answer with server-sent events. Refusals are raised before the headers; later errors travel in the stream.

    Before a model is loaded most cannot be known: then the headers go first.
    """
    with StreamCollector(answer) as collector, _registered(http_request, collector):
        if model.is_available:
            await ask(await model.loaded(limits.max_wait_seconds, api_key(http_request).tenant), collector)
            async with EventStream(http_request, limits.sse_comment_seconds) as stream:
                return await _send(collector, stream, limits)
        async with EventStream(http_request, limits.sse_comment_seconds) as stream:
            try:
                with stream.telling(model.loading.describe, LOADING_COMMENT_SECONDS):
                    engine = await model.loaded(limits.max_wait_seconds, api_key(http_request).tenant)
                await ask(engine, collector)
            except BrliteError as error:
                stream.send(error_body(error))
                return await stream.finish()
            return await _send(collector, stream, limits)


@contextmanager
def _registered(request: web.Request, collector: Collector) -> Iterator[None]:
    running = request.app[RUNNING]
    running.add(collector)
    try:
        yield
    finally:
        running.discard(collector)


async def _send(collector: StreamCollector, stream: EventStream, limits: LimitsConfig) -> web.StreamResponse:
    await collector.send_to(stream, limits.slow_client_seconds)
    return await stream.finish()

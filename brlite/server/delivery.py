"""Carries outputs from the engine to one HTTP response: chunk by chunk, or all at once.

The engine's sinks write to the client's socket themselves, so a token costs one write and wakes no task. A client that
is slower than its model gets merged deltas; one that leaves, in any way, has its requests aborted.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from aiohttp import web

from brlite.config import LimitsConfig
from brlite.engine.async_engine import AsyncEngine
from brlite.engine.request import Request, Sink
from brlite.errors import BrliteError, EngineError
from brlite.http.envelope import error_body
from brlite.http.events import EventStream
from brlite.outputs import RequestOutput
from brlite.server.answers import Answer


class Collector:
    """The outputs of several requests, merged per request until all are finished."""

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request]) -> None:
        self.outputs: dict[int, RequestOutput] = {}
        self._engine = engine
        self._requests = requests
        self._num_open = len(requests)
        self._error: BrliteError | None = None
        self._changed = asyncio.Event()

    def submit(self) -> None:
        """Queue all of them, or none: the first refusal takes the others back and is raised."""
        try:
            for index, request in enumerate(self._requests):
                self._engine.submit(request, self._sink(index))
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        for request in self._requests:
            self._engine.abort(request.request_id)

    async def wait(self) -> list[RequestOutput]:
        """All outputs, whole. Raises the error that ended one of the requests."""
        while self._num_open and self._error is None:
            await self._changed.wait()
            self._changed.clear()
        if self._error is not None:
            raise self._error
        outputs, self.outputs = self.outputs, {}
        return [outputs[index] for index in range(len(self._requests))]

    def count_unsent(self, answer: Answer) -> None:
        """Note in the answer's count what was computed for it, but for a client that did not wait."""
        for index, output in self.outputs.items():
            answer.count.add(index, output)

    def _sink(self, index: int) -> Sink:
        return functools.partial(self._receive, index)

    def _receive(self, index: int, output: RequestOutput | BrliteError) -> None:
        try:
            if isinstance(output, BrliteError):
                self._error = output
            else:
                self._num_open -= output.finished
                self._take(index, output)
        except Exception:  # the engine reports it; whoever waits here would wait for ever
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

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request], answer: Answer) -> None:
        super().__init__(engine, requests)
        self._answer = answer
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
            self._stream = None  # what the other prompts still say must not follow the end of the response

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


async def answer_whole(engine: AsyncEngine, requests: Sequence[Request], answer: Answer) -> web.Response:
    """Wait for all completions and answer with one body."""
    collector = Collector(engine, requests)
    collector.submit()
    try:
        body = answer.whole(await collector.wait())
    finally:
        collector.abort()
        collector.count_unsent(answer)
    return web.Response(body=body, content_type="application/json")


async def answer_stream(
    http_request: web.Request,
    engine: AsyncEngine,
    requests: Sequence[Request],
    answer: Answer,
    limits: LimitsConfig,
) -> web.StreamResponse:
    """Answer with server-sent events. Refusals are raised before the headers; later errors travel in the stream."""
    collector = StreamCollector(engine, requests, answer)
    collector.submit()
    try:
        async with EventStream(http_request, limits.sse_comment_seconds) as stream:
            await collector.send_to(stream, limits.slow_client_seconds)
            return await stream.finish()
    finally:
        collector.abort()
        collector.count_unsent(answer)

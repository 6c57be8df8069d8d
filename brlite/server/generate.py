"""The endpoint of each dialect: decode a call, admit it, deliver the response. Start reading at `generate`.

A delivery writes the engine's outputs to one HTTP response: as a stream, or as one body. A stream whose model must be
loaded begins before the load and reports the progress in comments. The engine's sinks write to the client's stream
without a task between, so a token costs one write. A client slower than the model gets merged deltas. When a client
disconnects, its requests are aborted.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Literal, Protocol, TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from brlite.config.options import Config, LimitsConfig
from brlite.dialects.dialect import Dialect, ResponseEncoder
from brlite.dialects.embeddings import PromptCall
from brlite.dialects.event import TokenUsage
from brlite.dialects.generation import MAX_TIMEOUT_SECONDS, Generation, in_client_words, refuse_warnings
from brlite.dialects.openai_answer import encode_json
from brlite.dialects.openai_tokens import Detokenization, Tokenization
from brlite.engine.admission import check_limits
from brlite.engine.async_engine import EngineLoop
from brlite.engine.outputs import RequestOutput, RequestTimes
from brlite.engine.request import Request, TextSink
from brlite.errors import BrliteError, EngineError, InvalidRequest, RequestTimeout, stopping
from brlite.http.access_log import log_extras
from brlite.http.body import keep_body, read_body
from brlite.http.events import EventStream
from brlite.http.keys import API_KEY, spend_tokens
from brlite.http.request_id import shown_request_id
from brlite.server import idempotency
from brlite.server.engine_requests import make_requests, with_model_defaults
from brlite.server.event_builder import EventBuilder
from brlite.server.resumable import RECORDED, RecordedStream
from brlite.server.served_model import ModelTable, ServedModel

TIMEOUT_HEADER = "X-Request-Timeout"
LOADING_COMMENT_SECONDS = 1.0
STOPPING_RETRY_SECONDS = 1
NOT_MADE = "the answer could not be made"
CONFIG = web.AppKey("config", Config)
MODELS = web.AppKey("models", ModelTable)
AnyCall = TypeVar("AnyCall", bound=Generation | PromptCall | Tokenization | Detokenization)


class Running(Protocol):
    """A request for a model that is in progress, and what may end it from outside."""

    def is_named(self, name: str, tenant: str) -> bool:
        """Whether the request or its response has this id, and belongs to the tenant."""
        ...

    def abort(self) -> None: ...

    def fail(self, error: BrliteError) -> None:
        """End the response with this error."""
        ...


RUNNING: web.AppKey[set[Running]] = web.AppKey("running")


async def generate(dialect: Dialect, request: web.Request, *, is_first: bool = False) -> web.StreamResponse:
    """Decode, admit, deliver: the endpoint of each dialect.

    `is_first`: the `Idempotency-Key` was already checked and is new, so compute the answer.
    """
    limits = request.app[CONFIG].limits
    body = await read_body(request, limits)
    if idempotency.HEADER in request.headers and not is_first and limits.max_idempotent_bytes:
        keep_body(request, body)
        compute, tenant = partial(generate, is_first=True), request[API_KEY].tenant
        return await request.app[idempotency.ANSWERS].answer(dialect, request, body, tenant, compute)
    call = decode_call(request, dialect.decode, body)
    make_delivery = StreamDelivery if call.is_streamed else WholeDelivery
    with admit(request, call.model) as model:
        delivery = make_delivery(request, dialect, call, call.model or model.name, limits)
        if call.timeout_seconds is not None or TIMEOUT_HEADER in request.headers:
            delivery.end_after(timeout_seconds(request, call.timeout_seconds))
        return await delivery.run(model)


def decode_call(request: web.Request, decode: Callable[[bytes, LimitsConfig], AnyCall], body: bytes) -> AnyCall:
    """The call in a body; strict on a strict server. Raises `InvalidRequest`, also for the warning of a strict call."""
    config = request.app[CONFIG]
    call = decode(body, config.limits)
    if config.server.strict:
        call = msgspec.structs.replace(call, is_strict=True)
    if call.is_strict:
        refuse_warnings(call.warnings)
    return call


async def read_call(request: web.Request, decode: Callable[[bytes, LimitsConfig], AnyCall]) -> AnyCall:
    """Read the body, and decode it as `decode_call` does."""
    return decode_call(request, decode, await read_body(request, request.app[CONFIG].limits))


def json_response(answer: Struct | Sequence[Struct]) -> web.Response:
    """The response of an answer that is not streamed."""
    return web.Response(body=encode_json(answer), content_type="application/json")


def timeout_seconds(request: web.Request, in_body: float | None) -> float:
    """The time limit in the request's body or header, one of which there must be. Raises `InvalidRequest`."""
    if in_body is not None:
        return in_body
    text = request.headers[TIMEOUT_HEADER]
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise InvalidRequest(
            f"{TIMEOUT_HEADER} must be seconds, above 0 and at most {MAX_TIMEOUT_SECONDS}, got {text[:64]!r}",
            param=TIMEOUT_HEADER,
        )
    return seconds


def timed_out(seconds: float) -> RequestTimeout:
    return RequestTimeout(f"the request was not complete after its timeout of {seconds:g} s", param="timeout")


@contextmanager
def admit(request: web.Request, name: str | None) -> Iterator[ServedModel]:
    """Count the request under its key, and keep the model loaded inside the block.

    Raises `Forbidden` or `RateLimited` for the key, `ModelNotFound`, and `NotReady` or `QueueFull` if the model does
    not accept requests. The key is checked first, so that a client without access cannot find out model names.
    """
    models, key = request.app[MODELS], request[API_KEY]
    model = models.get(name)
    if key.has_rules:
        key.begin(time.monotonic(), (name or "") if model is None else model.name, name or "")
    try:
        if model is None:
            raise models.unknown(name, key.may_use)
        if models.is_draining:
            raise stopping()
        with model.in_use(request.app[CONFIG].limits.max_waiting, key.tenant):
            yield model
    finally:
        if key.has_rules:
            key.end()


@asynccontextmanager
async def loaded(request: web.Request, name: str | None) -> AsyncIterator[tuple[ServedModel, EngineLoop]]:
    """Admit the request as `admit` does, and wait until the model is loaded."""
    with admit(request, name) as model:
        yield model, await model.loaded(request.app[CONFIG].limits.max_wait_seconds, request[API_KEY].tenant)


def end_all(app: web.Application) -> None:
    """End all responses in progress with an error; a stream gets an error event."""
    for delivery in app[RUNNING]:
        delivery.fail(stopping(STOPPING_RETRY_SECONDS))


class Delivery:
    """The response to one call. Call `run` inside `admit`.

    When `run` ends, also by an error or cancellation, unfinished requests are aborted, and the computed tokens are
    charged to the key and logged. A refusal uses the field names of the client's dialect.
    """

    take_text: TextSink | None = None  # takes deltas that are text alone; only a stream has it

    def __init__(
        self, request: web.Request, dialect: Dialect, call: Generation, model_name: str, limits: LimitsConfig
    ) -> None:
        self.id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
        self._request = request
        self._dialect = dialect
        self._call = call
        self._model_name = model_name
        self._limits = limits
        self._tenant = request[API_KEY].tenant
        self._outputs: dict[int, RequestOutput] = {}  # not sent yet
        self._num_open = 0
        self._num_searched = 0  # computed by beam search, but in no answer
        self._is_closed = False
        self._error: BrliteError | None = None
        self._times = RequestTimes(0.0, 0.0, 0.0)  # of the last prompt that has ended
        self._deadline: asyncio.TimerHandle | None = None
        self._preparing: asyncio.Task[object] | None = None  # the handler's, until the engine gets the requests
        self._text_end = None if call.make_text_end is None else call.make_text_end()
        self._changed = asyncio.Event()
        self._engine: EngineLoop
        self._requests: list[Request] = []
        self._builder: EventBuilder | None = None  # None until the engine has the requests
        self._encoder: ResponseEncoder

    async def run(self, model: ServedModel) -> web.StreamResponse:
        """Run the call and send its response. Raises the error that ended it if no part of a response has been sent."""
        self._request.app[RUNNING].add(self)
        try:
            await self._submit(model)
            return await self._send()
        except BrliteError as error:
            if isinstance(error, InvalidRequest):
                error = in_client_words(error, self._call.field_names)
            ended = await self._end_with(error)
            if ended is None:
                raise error from None
            return ended
        finally:
            self._close()

    async def _wait_for(self, model: ServedModel) -> EngineLoop:
        return await model.loaded(self._limits.max_wait_seconds, self._tenant)

    def end_after(self, seconds: float) -> None:
        """End with an error after `seconds`, unless the response is complete then. Also ends a wait for the model."""
        self._deadline = asyncio.get_running_loop().call_later(seconds, self.fail, timed_out(seconds))

    async def _submit(self, model: ServedModel) -> None:
        """Wait until the model is loaded, encode the prompts and queue their requests.

        Raises `RequestError` for the first refused prompt, or if the model cannot be loaded in time.
        """
        key = self._request[API_KEY]
        priority, raised = key.priority, tuple[str, ...]()
        if self._call.priority is not None:
            priority, raised = key.allowed_priority(self._call.priority)
            if self._call.is_strict:
                refuse_warnings(raised)
        engine = model.engine
        self._preparing = asyncio.current_task()
        try:
            if engine is None or model.is_held_back:
                check_limits(self._call.params, self._limits)  # the engine checks too, but only after the load
                engine = await self._wait_for(model)
            if engine.sampling_defaults:
                self._call = with_model_defaults(self._call, engine)
            made = await make_requests(self._call, engine, model.spec, self.id, self._tenant)
        except asyncio.CancelledError:
            if self._error is None:
                raise
            raise self._error from None
        finally:
            self._preparing = None
        self._engine, self._requests, self._num_open = engine, made.requests, len(made.requests)
        for index, request in enumerate(made.requests):
            if key.weight != 1 or priority:
                request = msgspec.structs.replace(request, weight=key.weight, priority=priority)
            engine.submit(request, partial(self._receive, index), self.take_text)
        warnings = (*self._call.warnings, *made.warnings, *made.truncations, *raised)
        self._builder = EventBuilder(self._call, engine.tokenizer, warnings, made.replies)
        self._encoder = self._dialect.make_encoder(self._call, self.id, self._model_name, engine.info.fingerprint)

    async def _send(self) -> web.StreamResponse:
        """Send the response to its end. Raises the error that ended one of the requests."""
        raise NotImplementedError

    def fail(self, error: BrliteError) -> None:
        """End the response with this error."""
        self._error = self._error or error
        self._changed.set()
        if self._preparing is not None:
            self._preparing.cancel()

    def abort(self) -> None:
        """End the generation at its next step. The response has the tokens so far and the finish reason "abort"."""
        for request in self._requests:
            self._engine.abort(request.request_id)

    def is_named(self, name: str, tenant: str) -> bool:
        """Whether the response or its request has this id, belongs to the tenant, and is in the engine."""
        return bool(self._requests) and tenant == self._tenant and name in (self.id, shown_request_id(self._request))

    async def _end_with(self, error: BrliteError) -> web.StreamResponse | None:
        """Write the error into a response that has begun. Else return None, and the middlewares send it."""
        return None

    def _receive(self, index: int, output: RequestOutput | BrliteError) -> None:
        """The sink of one prompt's request: takes an output, or the error that ended the request."""
        if isinstance(output, BrliteError):
            self.fail(output)
            return
        if self._is_closed:
            self._charge_late(index, output)
            return
        try:
            if output.finished:
                if output.num_searched_tokens:
                    num_shown = sum(len(completion.token_ids) for completion in output.outputs)
                    self._num_searched += max(0, output.num_searched_tokens - num_shown)
                self._num_open -= 1
                self._times = output.times or self._times
                self._changed.set()
            self._take(index, output)
            text_end = self._text_end
            if text_end is not None and not output.finished and any(text_end(each.text) for each in output.outputs):
                asyncio.get_running_loop().call_soon(self.abort)  # not inside the engine's update
        except Exception:  # the engine logs it; without an error the handler would wait forever
            self.fail(EngineError(NOT_MADE))
            raise

    def _charge_late(self, index: int, output: RequestOutput) -> None:
        """Charge what was computed for a client that has left: by the step that ran then, or for beams so far."""
        if self._builder is None or not (output.num_searched_tokens or any(each.token_ids for each in output.outputs)):
            return
        before = self._builder.usage()
        self._builder.count(index, output)
        after = self._builder.usage()
        num_completion = output.num_searched_tokens or after.completion - before.completion
        spend_tokens(self._request, after.prompt - before.prompt, num_completion)

    def _take(self, index: int, output: RequestOutput) -> None:
        if index in self._outputs:
            self._outputs[index].merge(output)
        else:
            self._outputs[index] = output

    def _close(self) -> None:
        self._is_closed = True
        self._error = None  # its traceback holds the frames that hold this delivery
        self._request.app[RUNNING].discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
        if self._num_open:
            self.abort()
        usage = TokenUsage(0, 0, 0)
        if self._builder is not None:
            for index, output in self._outputs.items():  # computed but not sent
                self._builder.count(index, output)
            usage = self._builder.usage()
        spend_tokens(self._request, usage.prompt, usage.completion + self._num_searched)
        spent = self._request[API_KEY].usage
        spent.queue_seconds += self._times.queue
        spent.prefill_seconds += self._times.prefill
        spent.decode_seconds += self._times.decode
        log_extras(self._request).update(
            model=self._model_name,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
            queue_s=round(self._times.queue, 3),
            prefill_s=round(self._times.prefill, 3),
            decode_s=round(self._times.decode, 3),
        )


class WholeDelivery(Delivery):
    """Waits for all completions and answers with one body."""

    async def _send(self) -> web.StreamResponse:
        assert self._builder is not None
        while self._num_open and self._error is None:
            await self._changed.wait()
            self._changed.clear()
        if self._error is not None:
            raise self._error
        outputs, self._outputs = self._outputs, {}
        events, warnings = self._builder.whole([outputs[index] for index in sorted(outputs)])
        body = self._encoder.whole(events, self._builder.usage(), warnings)
        return web.Response(body=body, content_type="application/json")


StreamState = Literal[  # the progress of a stream; it moves only down this list
    "waiting",  # no headers sent: an error is a normal error response
    "begun",  # headers are sent: an error is an event of the stream. Deltas are kept
    "sending",  # deltas are written as they come
    "over",  # nothing more is written: finished, failed, or the client has left
]


class StreamDelivery(Delivery):
    """Sends each delta at once, as server-sent events. `_outputs` holds those that a slow client cannot take yet.

    If the model must be loaded, the headers are sent before the load, which may fail.
    """

    _state: StreamState = "waiting"
    _writes_text = False  # whether deltas that are text alone need no events; not before the first one
    _stream: EventStream | RecordedStream  # once begun

    async def _begin(self) -> None:
        """Send the headers."""
        recorded = self._request.get(RECORDED)
        self._stream = recorded or EventStream(self._request, self._limits.sse_comment_seconds)
        await self._stream.prepare()
        self._state = "begun"

    async def _wait_for(self, model: ServedModel) -> EngineLoop:
        await self._begin()
        with self._stream.commenting(model.loading.describe, LOADING_COMMENT_SECONDS):
            return await super()._wait_for(model)

    async def _send(self) -> web.StreamResponse:
        """Returns early if the client left, or if its connection was cut because it read too slowly."""
        assert self._builder is not None
        if self._state == "waiting":
            await self._begin()
        prompts = TokenUsage(sum(len(request.prompt_token_ids) for request in self._requests), 0, 0)
        if opening := self._encoder.opening(prompts):
            self._stream.write(opening)
        self._state = "sending"
        self._flush()
        while self._num_open and self._error is None and self._state == "sending":
            await self._changed.wait()
            self._changed.clear()
            if self._outputs and not await self._stream.drained(self._limits.slow_client_seconds):
                self._state = "over"
            else:
                self._flush()
        is_whole = self._state == "sending"
        self._state = "over"  # write no outputs of other prompts after the end of the response
        if self._error is not None:
            raise self._error
        # Without its closing an encoder keeps no answer, neither for a retry nor for `previous_response_id`.
        return await self._stream.finish(self._encoder.closing(self._builder.usage()) if is_whole else b"")

    async def _end_with(self, error: BrliteError) -> web.StreamResponse | None:
        if self._state == "waiting":
            return None
        self._state = "over"
        failing = self._dialect.encode_error if self._builder is None else self._encoder.failing
        return await self._stream.finish(failing(error))

    def _take(self, index: int, output: RequestOutput) -> None:
        if self._state != "sending" or self._outputs or self._stream.is_backlogged:
            super()._take(index, output)
            self._changed.set()
        else:
            self._write(index, output)

    def _flush(self) -> None:
        outputs, self._outputs = self._outputs, {}
        for index, output in outputs.items():
            self._write(index, output)

    def take_text(self, text: str, num_tokens: int) -> bool:
        """Write the text while the client keeps up. False: `_receive` must get it."""
        if not self._writes_text or self._outputs or self._state != "sending":
            return False
        stream, builder = self._stream, self._builder
        if builder is None or not stream.is_clear:
            return False
        builder.num_completion += num_tokens
        try:
            data = self._encoder.encode_text(text) if text else b""
            if data:  # else the encoder withheld it
                stream.append(data)
        except Exception:  # as in `_receive`
            self.fail(EngineError(NOT_MADE))
            raise
        return True

    def _write(self, index: int, output: RequestOutput) -> None:
        assert self._builder is not None
        data = b"".join(map(self._encoder.encode, self._builder.events(index, output)))
        self._writes_text = self._builder.is_text_only and self._text_end is None
        if not self._stream.write(data):
            self._state = "over"  # the client has left; not every server cancels the handler then
            self._changed.set()

    def _close(self) -> None:
        if self._state != "waiting":
            self._stream.close()
        self._state = "over"
        super()._close()

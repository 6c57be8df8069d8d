"""The endpoint of each dialect: decode a call, admit it, compute it, send the response. Start reading at `generate`.

A streamed response whose model must be loaded begins before the load and reports the progress in comments. The engine's
sinks write to the client's stream without a task between, so a token costs one write. A client slower than the model
gets merged deltas. When a client disconnects, its requests are aborted.
"""

from __future__ import annotations

import asyncio
import operator
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

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
NO_TIMES = RequestTimes(0.0, 0.0, 0.0)
CONFIG = web.AppKey("config", Config)
MODELS = web.AppKey("models", ModelTable)
AnyCall = TypeVar("AnyCall", bound=Generation | PromptCall | Tokenization | Detokenization)


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
    answer_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
    with admit(request, call.model) as model:
        delivery = Delivery(request, call, model, answer_id, dialect)
        return await (Streaming(delivery).run() if call.is_streamed else deliver_whole(delivery))


def decode_call(request: web.Request, decode: Callable[[bytes, LimitsConfig], AnyCall], body: bytes) -> AnyCall:
    """The call in a body: strict on a strict server, with a priority that its key may have.

    Raises `InvalidRequest`, also for the warning of a strict call.
    """
    config = request.app[CONFIG]
    call = decode(body, config.limits)
    if config.server.strict:
        call = msgspec.structs.replace(call, is_strict=True)
    if isinstance(call, Generation | PromptCall) and call.priority is not None:
        priority, raised = request[API_KEY].allowed_priority(call.priority)
        call = msgspec.structs.replace(call, priority=priority, warnings=(*call.warnings, *raised))
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


RUNNING: web.AppKey[set[RunningCall]] = web.AppKey("running")


def end_all(app: web.Application) -> None:
    """End all responses in progress with an error; a stream gets an error event."""
    for running in app[RUNNING]:
        running.fail(stopping(STOPPING_RETRY_SECONDS))


@dataclass(eq=False)
class RunningCall(ABC):
    """An admitted call to a model, and what ends it from outside: its time limit, an abort, the server's stop."""

    request: web.Request
    call: Generation | PromptCall
    model: ServedModel
    id: str
    _task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task, init=False)
    _error: BrliteError | None = field(default=None, init=False)

    @property
    def model_name(self) -> str:
        """The name that the client sees."""
        return self.call.model or self.model.name

    @property
    def limits(self) -> LimitsConfig:
        return self.request.app[CONFIG].limits

    async def loaded(self) -> EngineLoop:
        """Wait until the model is loaded. Raises `NotReady` if that fails or takes too long."""
        return await self.model.loaded(self.limits.max_wait_seconds, self.request[API_KEY].tenant)

    @contextmanager
    def in_progress(self) -> Iterator[None]:
        """The block ends by `fail`, and at the time limit in the request's body or header.

        It raises the error then, `RequestTimeout` at the limit. Raises `InvalidRequest` for a wrong limit.
        """
        running, deadline = self.request.app[RUNNING], None
        if self.call.timeout_seconds is not None or TIMEOUT_HEADER in self.request.headers:
            seconds = timeout_seconds(self.request, self.call.timeout_seconds)
            deadline = asyncio.get_running_loop().call_later(seconds, self.fail, timed_out(seconds))
        running.add(self)
        try:
            yield
        except asyncio.CancelledError:
            if self._error is None:
                raise
            raise self._error from None
        finally:
            running.discard(self)
            self._error = None  # its traceback holds the frames that hold this object
            if deadline is not None:
                deadline.cancel()

    def fail(self, error: BrliteError) -> None:
        """End the call with this error, unless it has ended or another error ends it: cancel its task."""
        if self._error is None and self in self.request.app[RUNNING]:
            self._error = error
            assert self._task is not None
            self._task.cancel()

    def is_named(self, name: str, tenant: str) -> bool:
        """Whether the call or its answer has this id, and belongs to the tenant."""
        is_own = tenant == self.request[API_KEY].tenant
        return is_own and name in (self.id, shown_request_id(self.request))

    @abstractmethod
    def abort(self) -> None:
        """End the call, because its client asks for it."""


@dataclass(eq=False)
class Delivery(RunningCall):
    """A call that generates text. `close` must follow."""

    call: Generation
    dialect: Dialect
    _computation: Computation | None = field(default=None, init=False)
    _builder: EventBuilder | None = field(default=None, init=False)  # None until the engine has the requests

    async def start(
        self, engine: EngineLoop, take: Take, take_text: TextSink | None = None
    ) -> tuple[Computation, EventBuilder, ResponseEncoder]:
        """Encode the prompts and queue their requests. Raises `RequestError` for the first refused prompt.

        `take` gets each output and its prompt's index. `take_text` gets deltas that are text alone.
        """
        call = self.call
        if engine.sampling_defaults:
            call = with_model_defaults(call, engine)
        made = await make_requests(call, engine, self.model.spec, self.id, self.request[API_KEY])
        computation = self._computation = Computation(
            self, engine, made.requests, take, call.make_text_end and call.make_text_end(), len(made.requests)
        )
        for index, request in enumerate(made.requests):
            engine.submit(request, partial(computation.receive, index), take_text)
        warnings = (*call.warnings, *made.warnings, *made.truncations)
        builder = self._builder = EventBuilder(call, engine.tokenizer, warnings, made.replies)
        # Only now, since a background response then exists for its client.
        encoder = self.dialect.make_encoder(call, self.id, self.model_name, engine.info.fingerprint)
        return computation, builder, encoder

    def is_named(self, name: str, tenant: str) -> bool:
        """As for other calls, and whether the engine has its requests."""
        return self._computation is not None and super().is_named(name, tenant)

    def abort(self) -> None:
        """End the generation at its next step. The response has the tokens so far and the finish reason "abort"."""
        if self._computation is not None:
            self._computation.abort()

    def close(self) -> None:
        """Abort the requests that have not ended. Charge what was computed to the key, and log it."""
        usage, times = TokenUsage(0, 0, 0), NO_TIMES
        if self._computation is not None:
            outputs, times = self._computation.close()
            self._computation = None  # they refer to each other
            if (builder := self._builder) is not None:
                for index, output in outputs.items():  # computed but not sent
                    builder.count(index, output)
                usage = builder.usage()
                spend_tokens(self.request, *builder.spent())
        spent = self.request[API_KEY].usage
        spent.queue_seconds += times.queue
        spent.prefill_seconds += times.prefill
        spent.decode_seconds += times.decode
        log_extras(self.request).update(
            model=self.model_name,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
            queue_s=round(times.queue, 3),
            prefill_s=round(times.prefill, 3),
            decode_s=round(times.decode, 3),
        )

    def charge_late(self, index: int, output: RequestOutput) -> None:
        """Charge what was computed for a client that has left: by the step that ran then, or for beams so far."""
        builder = self._builder
        if builder is not None and (output.num_searched_tokens or any(each.token_ids for each in output.outputs)):
            before = builder.spent()
            builder.count(index, output)
            spend_tokens(self.request, *map(operator.sub, builder.spent(), before))


@dataclass(eq=False)
class Computation:
    """The requests of one call in the engine, and their outputs that are not sent yet.

    `kept` has these by the index of their prompt. `changed` is set when a prompt has ended. An error of the engine ends
    the call.
    """

    _delivery: Delivery
    _engine: EngineLoop
    requests: list[Request]
    _take: Take | None  # None: closed. What comes then is only charged
    _text_end: Callable[[str], bool] | None
    num_open: int
    kept: dict[int, RequestOutput] = field(default_factory=dict, init=False)
    changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _times: RequestTimes = field(default=NO_TIMES, init=False)  # of the last prompt that has ended

    def receive(self, index: int, output: RequestOutput | BrliteError) -> None:
        """The sink of one prompt's request: takes an output, or the error that ended the request."""
        if isinstance(output, BrliteError):
            self._delivery.fail(output)
            return
        if self._take is None:
            self._delivery.charge_late(index, output)
            return
        try:
            if output.finished:
                self.num_open -= 1
                self._times = output.times or self._times
                self.changed.set()
            self._take(self, index, output)
            text_end = self._text_end
            if text_end is not None and not output.finished and any(text_end(each.text) for each in output.outputs):
                asyncio.get_running_loop().call_soon(self.abort)  # not inside the engine's update
        except Exception:  # the engine logs it; without an error the handler would wait forever
            self._delivery.fail(EngineError(NOT_MADE))
            raise

    def keep(self, index: int, output: RequestOutput) -> None:
        """Keep an output until it is sent, merged with earlier ones."""
        if index in self.kept:
            self.kept[index].merge(output)
        else:
            self.kept[index] = output

    def take_kept(self) -> dict[int, RequestOutput]:
        kept, self.kept = self.kept, {}
        return kept

    def abort(self) -> None:
        for request in self.requests:
            self._engine.abort(request.request_id)

    def close(self) -> tuple[dict[int, RequestOutput], RequestTimes]:
        """Abort the requests that have not ended. Returns the outputs that are not sent, and the times."""
        self._take = None
        if self.num_open:
            self.abort()
        return self.take_kept(), self._times


Take = Callable[[Computation, int, RequestOutput], None]


async def deliver_whole(delivery: Delivery) -> web.Response:
    """Wait for all completions and answer with one body."""
    model = delivery.model
    try:
        with delivery.in_progress():
            if (engine := model.engine) is None or model.is_held_back:
                check_limits(delivery.call.params, delivery.limits)  # the engine checks, too, but only after the load
                engine = await delivery.loaded()
            computation, builder, encoder = await delivery.start(engine, Computation.keep)
            while computation.num_open:
                await computation.changed.wait()
                computation.changed.clear()
            outputs = computation.take_kept()
            events, warnings = builder.whole([outputs[index] for index in sorted(outputs)])
            body = encoder.whole(events, builder.usage(), warnings)
    except InvalidRequest as error:
        raise in_client_words(error, delivery.call.field_names) from None
    finally:
        delivery.close()
    return web.Response(body=body, content_type="application/json")


StreamState = Literal[  # the progress of a stream; it moves only down this list
    "waiting",  # no headers sent: an error is a normal error response
    "begun",  # headers are sent: an error is an event of the stream. Deltas are kept
    "sending",  # deltas are written as they come
    "over",  # nothing more is written: finished, failed, or the client has left
]


@dataclass(eq=False)
class Streaming:
    """Sends each delta at once, as server-sent events. The computation keeps what a slow client cannot take yet."""

    delivery: Delivery
    _state: StreamState = field(default="waiting", init=False)
    _writes_text: bool = field(default=False, init=False)  # deltas that are text alone need no events
    _stream: EventStream | RecordedStream = field(init=False)  # once begun
    _computation: Computation = field(init=False)  # these three once the engine has the requests
    _builder: EventBuilder = field(init=False)
    _encoder: ResponseEncoder = field(init=False)

    async def run(self) -> web.StreamResponse:
        """Send the response. Raises the error that ended the call if no headers have been sent.

        Returns early if the client left, or if its connection was cut because it read too slowly.
        """
        delivery, model = self.delivery, self.delivery.model
        encode_error = delivery.dialect.encode_error
        try:
            with delivery.in_progress():
                if (engine := model.engine) is None or model.is_held_back:
                    engine = await self._load()
                started = await delivery.start(engine, self._take, self._take_text)
                computation, builder, encoder = self._computation, self._builder, self._encoder = started
                encode_error = encoder.failing
                if self._state == "waiting":
                    await self._begin()
                num_prompt = sum(len(request.prompt_token_ids) for request in computation.requests)
                if opening := encoder.opening(TokenUsage(num_prompt, 0, 0)):
                    self._stream.write(opening)
                self._state = "sending"
                await self._send_all(computation)
                # Without its closing an encoder keeps no answer, neither for a retry nor for `previous_response_id`.
                last = encoder.closing(builder.usage()) if self._state == "sending" else b""
        except BrliteError as error:
            if isinstance(error, InvalidRequest):
                error = in_client_words(error, delivery.call.field_names)
            if self._state == "waiting":
                raise error from None
            last = encode_error(error)
        finally:
            delivery.close()
            if self._state != "waiting":
                self._stream.close()
            self._state = "over"  # write no outputs of other prompts after the end of the response
        return await self._stream.finish(last)

    async def _begin(self) -> None:
        """Send the headers."""
        request = self.delivery.request
        self._stream = request.get(RECORDED) or EventStream(request, self.delivery.limits.sse_comment_seconds)
        await self._stream.prepare()
        self._state = "begun"

    async def _load(self) -> EngineLoop:
        """Send the headers and wait for the load, which may fail then."""
        check_limits(self.delivery.call.params, self.delivery.limits)
        await self._begin()
        with self._stream.commenting(self.delivery.model.loading.describe, LOADING_COMMENT_SECONDS):
            return await self.delivery.loaded()

    async def _send_all(self, computation: Computation) -> None:
        """Return when all prompts have ended; or, with the state "over", when the client left or read too slowly."""
        try:
            while computation.num_open and self._state == "sending":
                self._flush()
                await computation.changed.wait()
                computation.changed.clear()
                if computation.kept and not await self._stream.drained(self.delivery.limits.slow_client_seconds):
                    self._state = "over"
        finally:
            self._flush()  # also what came before an error

    def _flush(self) -> None:
        for index, output in self._computation.take_kept().items():
            self._write(index, output)

    def _take(self, computation: Computation, index: int, output: RequestOutput) -> None:
        if self._state != "sending" or computation.kept or self._stream.is_backlogged:
            computation.keep(index, output)
            computation.changed.set()
        else:
            self._write(index, output)

    def _take_text(self, text: str, num_tokens: int) -> bool:
        """Write the text while the client keeps up. False: `_take` must get it."""
        if not self._writes_text or self._state != "sending" or self._computation.kept or not self._stream.is_clear:
            return False
        self._builder.num_completion += num_tokens
        try:
            data = self._encoder.encode_text(text) if text else b""
            if data:  # else the encoder withheld it
                self._stream.append(data)
        except Exception:  # as in `Computation.receive`
            self.delivery.fail(EngineError(NOT_MADE))
            raise
        return True

    def _write(self, index: int, output: RequestOutput) -> None:
        data = b"".join(map(self._encoder.encode, self._builder.events(index, output)))
        self._writes_text = self._builder.is_text_only  # not before the first delta
        if not self._stream.write(data):
            self._state = "over"  # the client has left; not every server cancels the handler then
            self._computation.changed.set()

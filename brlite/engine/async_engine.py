"""The engine in an event loop: a task schedules and delivers, a thread computes; they share only batch and result.

Lives in whatever loop it is started in: no signal handlers, no logging set-up, no globals. Everything but the backend's
own methods runs on the loop's thread, so there are no locks. A backend that can run ahead has the next step before the
result of the one before is read, so its device does not wait for the loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

from brlite.config.options import EngineConfig
from brlite.engine.admission import read_token_ids
from brlite.engine.backend import (
    Backend,
    BackendInfo,
    Batch,
    CanBeLost,
    CanClose,
    CanRunAhead,
    StepResult,
    close_all,
    close_dropped,
)
from brlite.engine.engine import Engine
from brlite.engine.fair_thread import FairThread
from brlite.engine.guidance import StepGuidance
from brlite.engine.logits_processors import Processors
from brlite.engine.outputs import RequestOutput
from brlite.engine.prompt_encoder import PromptEncoder
from brlite.engine.request import Origin, Request, Sink, TextSink
from brlite.engine.stats import EngineStats
from brlite.errors import (
    BackendLost,
    BrliteError,
    EngineError,
    InvalidRequest,
    NotReady,
    stopping,
    without_stop_iteration,
)
from brlite.grammar.compiler import deep_stack
from brlite.grammar.matcher import Grammar
from brlite.sampling_params import PoolingParams, SamplingParams, StructuredOutput

logger = logging.getLogger(__name__)

LOST = "a process or device that computes the model is gone; the request was not completed"
RETRY_SECONDS = 5  # Retry-After of a request to an engine that does not run
_NO_COMPLETION = SamplingParams()
UNKNOWN_ORIGIN = Origin()


class BegunStep(NamedTuple):
    """A step that was scheduled and whose result is not delivered. `launched` is None if it cannot run ahead."""

    batch: Batch
    guidance: StepGuidance | None
    filling: asyncio.Future[None] | None
    launched: Future[Callable[[], StepResult]] | None


class OwnLoop:
    """The event loop that an engine was started in. The engine has no locks, so it is used in no other."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """Raise `RuntimeError` in any other loop. Before the start it does nothing: `submit` refuses requests then."""
        if self.loop is None:
            return
        running = asyncio.get_running_loop()
        if running is not self.loop:
            state = "is closed" if self.loop.is_closed() else "is another one"
            raise RuntimeError(
                f"this engine belongs to the event loop it was started in, {self.loop!r}, which {state}; the running "
                f"loop is {running!r}. Load an engine in each loop (each asyncio.run), or serve from one"
            )


class EngineLoop:
    """Serves requests from the event loop it is used in: `async with EngineLoop(engine, backend) as engine`.

    Owns the engine, the backend and the step thread; `close` ends every open request with `NotReady` and leaves no
    task and no thread behind. Cancelling a reader of `generate` aborts its request. It belongs to the loop in which it
    was started: used from another one, or after that one has ended, its methods raise `RuntimeError`. A closed engine
    is in no reference cycle: its memory is free when it is dropped, and the garbage collector need not run.
    """

    def __init__(self, engine: Engine, backend: Backend) -> None:
        self._engine = engine
        self._backend = backend
        self.info: BackendInfo = engine.info
        self.config: EngineConfig = engine.config
        self.may_draft = engine.may_draft
        self.tokenizer = engine.tokenizer
        self.sampling_defaults = engine.sampling_defaults
        self.scoring_head = engine.scoring_head
        self.running = engine.running
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="brlite-step")
        self._own_loop = OwnLoop()
        self._check_loop = self._own_loop.check
        self.prompts = PromptEncoder(engine, self._check_loop)
        self._compiler = FairThread("brlite-grammar", stopping, deep_stack)  # starts with the first grammar
        self._factories = FairThread("brlite-processors", stopping)  # likewise
        self._fair_threads: tuple[CanClose, ...] = (self.prompts, self._compiler, self._factories)
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="brlite-masks")  # likewise
        self._launch = backend.launch if isinstance(backend, CanRunAhead) and backend.info.can_run_ahead else None
        self._begun: deque[BegunStep] = deque()
        self._pid = os.getpid()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_running = False  # whether the loop that steps the engine is alive
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._lost: BackendLost | None = None
        self._on_lost: Callable[[], None] | None = None
        self._draft_model = engine.draft_model
        self._backends = [backend] if engine.draft_model is None else [backend, engine.draft_model.backend]
        self._finalizer = weakref.finalize(self, close_dropped, type(self).__name__, self._backends)
        self._finalizer.atexit = False  # the end of the process gives everything back

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    @property
    def has_failed_draft_model(self) -> bool:
        """Whether it had a draft model that raised an error and is not used any more."""
        return self._draft_model is not None and self._draft_model.is_off

    def continue_stats(self, stats: EngineStats) -> None:
        """Continue the counters of an engine that served the same model before. Call it before the first request."""
        self._engine.continue_stats(stats)

    def longest_waits(self) -> dict[int, float]:
        """As `Engine.longest_waits`."""
        return self._engine.longest_waits()

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call `on_lost` after the backend was lost and all requests have ended. No step runs after that."""
        self._on_lost = on_lost

    async def start(self) -> None:
        """Begin to serve in the running loop. On a running engine this does nothing.

        Raises `EngineError` after `close`, and where its loop has failed.
        """
        if self._own_loop.loop is not None or self._closing is not None:
            self._check_loop()
            if self.is_running and self._closing is None:
                return
            raise EngineError("the engine has stopped and cannot be started again; load the model anew")
        loop = self._own_loop.loop = asyncio.get_running_loop()
        engine = weakref.ref(self)  # a backend outlives an engine that is dropped, so it must not hold it

        def lose(error: BackendLost) -> None:  # on the backend's thread
            if (alive := engine()) is not None:
                with suppress(RuntimeError):  # the loop is closed: nothing waits in it
                    loop.call_soon_threadsafe(alive._lose, error)

        if isinstance(self._backend, CanBeLost):
            self._backend.watch(lose)
        self._task = asyncio.create_task(self._run(), name="brlite-engine")
        self.is_running = True
        self._task.add_done_callback(self._on_stopped)

    async def close(self) -> None:
        """Stop stepping, end what is open, and give back the backend and the threads.

        May be called twice. Cancelling the caller does not stop the closing; another call waits for its end.
        If the loop that it was started in is closed, it may be called in any other loop. In a forked child it does
        nothing: the threads and the backend are the parent's.
        """
        if os.getpid() != self._pid:
            return
        if self._own_loop.loop is not None and self._own_loop.loop.is_closed():
            self._close_without_loop()
            return
        self._check_loop()
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="brlite-close")
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> EngineLoop:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def submit(self, request: Request, sink: Sink, text_sink: TextSink | None = None) -> None:
        """Queue a request; `sink` gets its deltas on this thread. Raises `RequestError` where it cannot be served.

        `text_sink` is offered each delta's text first, for one completion without logprobs: a token without a delta
        object costs much less.
        """
        self._check_loop()
        if not self.is_running:
            raise NotReady("the engine is not running", retry_after_seconds=RETRY_SECONDS)
        self._engine.add_request(request, sink, text_sink)
        self._idle.clear()
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """End a request within one step. Its sink gets a last output with finish reason "abort"."""
        self._check_loop()
        self._engine.abort(request_id)
        self._wake.set()

    async def compile(self, wish: StructuredOutput | None, *, tenant: str = "") -> Grammar | None:
        """The grammar of `SamplingParams.structured`, for `Request.grammar`.

        Raises `InvalidRequest`, which names the place of the mistake. Tenants share the compiling thread in turns.
        Compiled grammars are cached for later requests.
        """
        if wish is None:
            return None
        self._check_loop()
        return await self._compiler.run(tenant, partial(self._engine.compiler.compile, wish))

    async def make_processors(self, params: SamplingParams, *, tenant: str = "") -> Processors | None:
        """The logits processors for `Request.processors`, made on a thread of their own: a factory may take long.

        Raises `InvalidRequest` for a name that is not allowed, and for arguments that its factory refuses.
        """
        if not params.logits_processors:
            return None
        self._check_loop()
        return await self._factories.run(tenant, partial(self._engine.processor_maker.make, params))

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        tenant: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's new tokens and text until it is finished; outputs that are not read in time are merged.

        Without `params` the model's own defaults are used, as in `LLM.generate`.
        Raises `RequestError` for a request that cannot be served and `EngineError` where its step failed. Leaving the
        iterator, or cancelling its task, aborts the request.
        """
        params = params or SamplingParams(**self.sampling_defaults)
        request = Request(
            request_id=request_id or uuid.uuid4().hex,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=await self.prompts.encode(prompt, tenant=tenant)
            if isinstance(prompt, str)
            else read_token_ids(prompt),
            params=params,
            cache_salt=cache_salt,
            tenant=tenant,
            grammar=await self.compile(params.structured, tenant=tenant),
            bad_words=await self.prompts.encode_bad_words(params, tenant=tenant),
            processors=await self.make_processors(params, tenant=tenant),
        )
        stream = OutputStream()
        self.submit(request, stream.put)
        is_finished = False
        try:
            while not is_finished:
                output = await stream.get()
                is_finished = output.finished
                yield output
        finally:
            if not is_finished:
                self.abort(request.request_id)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation, a list of `{"role": …, "content": …}`, as `generate` does.

        The model's chat template makes the prompt. Raises `InvalidRequest` for a model without one.
        """
        if isinstance(messages, Mapping) or not all(isinstance(message, Mapping) for message in messages):
            wanted = 'a list of {"role": ..., "content": ...}'
            raise InvalidRequest(f"messages must be {wanted}, got {messages!r:.80}", param="messages")
        async with aclosing(self.generate(await self.prompts.encode_chat(messages), params)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: PoolingParams | None = None,
        *,
        origin: Origin = UNKNOWN_ORIGIN,
        request_id: str | None = None,
        names: Sequence[str] = (),
    ) -> list[RequestOutput]:
        """One output for each prompt, in order, with its `.embedding`. The prompts share one turn in the queue.

        Before anything runs it raises `InvalidRequest` for a wrong prompt, with its name ("prompts[0]" without
        `names`). If prompts fail later, it raises the error of the first. Cancelling the task aborts them all.
        """
        prefix, requests = request_id or uuid.uuid4().hex, list[Request]()
        for number, prompt in enumerate(prompts):
            text = prompt if isinstance(prompt, str) else None
            param = names[number] if names else f"prompts[{number}]"
            if text is not None:
                await asyncio.sleep(0)  # short texts are encoded on this thread: let other tasks run between two
            request = Request(
                request_id=f"{prefix}-{number}",
                prompt=text,
                prompt_token_ids=await self.prompts.encode(text, param=param, room=0, tenant=origin.tenant)
                if text is not None
                else read_token_ids(prompt),
                params=_NO_COMPLETION,
                cache_salt=origin.cache_salt,
                tenant=origin.tenant,
                weight=origin.weight,
                priority=origin.priority,
                group=prefix,
                is_exempt_from_queue_timeout=number > 0,
                pooling=params or PoolingParams(),
            )
            try:
                self._engine.check(request)
            except InvalidRequest as error:
                if error.param != "prompt":  # an error about all prompts keeps its own name
                    raise
                raise type(error)(f"{param}: {error}", param=param, code=error.code) from None
            requests.append(request)
        return await self._run_together(requests)

    async def _run_together(self, requests: list[Request]) -> list[RequestOutput]:
        """The outputs of requests that give one output each, all or none. At most two steps' worth is submitted."""
        changed, outputs, error = asyncio.Event(), dict[str, RequestOutput](), list[BrliteError]()
        waiting, running = deque(requests), set[str]()

        def take(request_id: str, output: RequestOutput | BrliteError) -> None:
            running.discard(request_id)
            if isinstance(output, BrliteError):
                error.append(output)
            elif output.embedding is None:
                error.append(EngineError("the request was aborted"))
            else:
                outputs[request_id] = output
            changed.set()

        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.info.max_num_seqs:
                    request = waiting.popleft()
                    self.submit(request, partial(take, request.request_id))
                    running.add(request.request_id)
                await changed.wait()
                changed.clear()
                if error:
                    raise error[0]
        finally:
            for request_id in running:
                self._engine.abort(request_id)
            self._wake.set()
        return [outputs[request.request_id] for request in requests]

    async def wait_idle(self) -> None:
        """Return when no request is left."""
        self._check_loop()
        await self._idle.wait()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an AsyncEngine cannot be pickled or copied: it holds a loaded model; send its Config and load it there"
        )

    def _close_without_loop(self) -> None:
        """Release everything at once. No task is left to end; `Backend.close` waits for a step under way."""
        self._finalizer.detach()
        self._engine.end_all(partial(NotReady, "the event loop of the engine is closed"))
        close_all(self._fair_threads)
        self._thread.shutdown(wait=False)
        self._masks.shutdown(wait=False)
        close_all([self.tokenizer, *self._backends])

    async def _close(self) -> None:
        self._finalizer.detach()
        close_all(self._fair_threads)
        self.is_running = False
        if self._task is not None:
            self._task.cancel()
        self._engine.end_all(stopping)
        self._idle.set()
        owned: list[CanClose] = [self.tokenizer, *self._backends]  # with the tokenizer, a chat's rendering ends
        closing = self._thread.submit(close_all, owned)  # after the step under way
        try:
            if self._task is not None:
                await asyncio.wait([self._task])
            await asyncio.shield(asyncio.wrap_future(closing))  # the end of `asyncio.run` cancels this task, too
        finally:
            self._thread.shutdown(wait=True)
            self._masks.shutdown(wait=True)
            self._task = self._lost = self._on_lost = None  # a task that has ended refers to this object by its error

    async def _run(self) -> None:
        while True:
            try:
                await self._step()
            except BackendLost:
                raise
            except Exception as error:  # a request that the engine's code fails on must not stop the engine
                if os.getpid() != self._pid:
                    return  # in a forked child asyncio has no running loop: every step would fail
                self._engine.stats.engine_failures += 1
                logger.critical("the engine failed between two steps", exc_info=error)
                self._engine.end_all(partial(EngineError, "the engine failed; the request was not completed"))
                while self._begun:  # a backend's results are fetched once each, in order
                    with suppress(Exception):
                        await self._result(self._begun.popleft())
                self._engine.check_integrity()

    async def _step(self) -> None:
        """Decide, compute on the other thread, deliver; or sleep if there is nothing to do."""
        self._wake.clear()  # what comes from now on ends the next sleep
        if self._lost is not None:
            raise self._lost
        if not self._begun:
            if self._draft_model is not None and (plan := self._engine.plan_drafts()) is not None:
                loop = asyncio.get_running_loop()
                drafts = await loop.run_in_executor(self._thread, self._draft_model.run, plan)
                self._engine.take_drafts(plan, drafts)
            self._begin(self._engine.schedule())
        if not self._begun:
            await self._wait_for_work()
            return
        if self._launch is not None:
            self._begin(self._engine.schedule_ahead())
        step = self._begun.popleft()
        try:
            result = await self._result(step)
        except BackendLost:
            raise
        except Exception as error:  # a failed step ends its own requests, never the loop
            self._engine.fail(error)
        else:
            self._engine.update(result)
        if step.filling is not None:
            await step.filling  # already done, unless the step failed early

    async def _wait_for_work(self) -> None:
        """Sleep until a request comes or is aborted. If none is left, check before that no block was lost."""
        if not self._engine.has_work:
            try:
                self._engine.check_idle()
            except EngineError as error:
                self._engine.stats.engine_failures += 1
                logger.error("the engine lost track of its blocks: %s", error)
            self._idle.set()
        await self._wake.wait()

    def _begin(self, batch: Batch | None) -> None:
        """Start to fill the masks of a step that was just scheduled, and launch the step if it can run ahead."""
        if batch is None:
            return
        guidance, filling = self._engine.guidance, None
        if guidance is not None:
            try:
                filling = asyncio.get_running_loop().run_in_executor(self._masks, guidance.fill)
            except RuntimeError as error:  # the system gives no more threads; the next step tries again
                logger.warning("token masks are filled on the event loop: %s", error)
                guidance.fill()
        launched = None if self._launch is None else self._thread.submit(self._launch, batch)
        self._begun.append(BegunStep(batch, guidance, filling, launched))

    async def _result(self, step: BegunStep) -> StepResult:
        def compute() -> StepResult:
            """On the step thread: compute one step, and advance the grammars by its tokens."""
            result = self._backend.execute(step.batch) if step.launched is None else step.launched.result()()
            if step.guidance is not None:
                step.guidance.advance(result)
            return result

        return await asyncio.get_running_loop().run_in_executor(self._thread, without_stop_iteration, compute)

    def _on_stopped(self, task: asyncio.Task[None]) -> None:
        """The loop ended. If it failed, end all requests with an error: no step will run again."""
        self.is_running = False
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, BackendLost):
            logger.critical("the backend is lost: %s", error)
            self._engine.end_all(partial(EngineError, LOST))
        elif isinstance(error, Exception):
            logger.critical("the engine loop died", exc_info=error)
            self._engine.end_all(partial(EngineError, "the engine stopped unexpectedly; the request was not completed"))
        else:  # a signal's KeyboardInterrupt, which comes wherever the main thread is
            self._engine.end_all(stopping)
        self._idle.set()
        if isinstance(error, BackendLost) and self._on_lost is not None:
            self._on_lost()

    def _lose(self, error: BackendLost) -> None:
        self._lost = error
        self._wake.set()


class OutputStream:
    """One request's outputs between the engine and a reader that may be slower: unread deltas merge into one."""

    def __init__(self) -> None:
        self._output: RequestOutput | None = None
        self._error: BrliteError | None = None
        self._ready = asyncio.Event()

    def put(self, output: RequestOutput | BrliteError) -> None:
        if isinstance(output, BrliteError):
            self._error = output
        elif self._output is None:
            self._output = output
        else:
            self._output.merge(output)
        self._ready.set()

    async def get(self) -> RequestOutput:
        """The merged deltas since the last call. When all are read, raises the error that ended the request."""
        await self._ready.wait()
        self._ready.clear()
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None, "the event is set with one of the two"
            raise self._error
        if self._error is not None:
            self._ready.set()
        return output

"""Builds a model: files, tokenizer, backend, engine. The only file that imports both the engine and the backends.

`LLM` is offline inference without an event loop; `AsyncEngine` runs on the event loop of its caller.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import math
import os
import sys
import threading
import weakref
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec

from brlite.config.load import load_config
from brlite.config.options import (
    DEFAULT_MODEL,
    DEFAULT_MODEL_SAMPLING,
    ENGINE_VARIABLE,
    Config,
    LimitsConfig,
    ModelSpec,
)
from brlite.config.validation import engine_override, model_override, override
from brlite.config.warnings import check_supported, config_warnings
from brlite.engine.admission import read_token_ids
from brlite.engine.async_engine import EngineLoop
from brlite.engine.backend import Backend, check_process, close_dropped
from brlite.engine.engine import Engine
from brlite.engine.outputs import RequestOutput
from brlite.engine.request import Request
from brlite.engine.scoring import ScoringHead
from brlite.errors import BrliteError, EngineError, InvalidRequest, ModelError
from brlite.process.waiting import start_daemon
from brlite.sampling_params import PoolingParams, SamplingParams
from brlite.tokenizer import ChildLimits, Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnProgress = Callable[[str, float], None]


class Assembly(NamedTuple):
    """A loaded model: the engine decides what to compute, the backend computes it."""

    engine: Engine
    backend: Backend

    @property
    def backends(self) -> list[Backend]:
        """The backend, and that of the draft model if there is one. The owner of the assembly closes them."""
        draft_model = self.engine.draft_model
        return [self.backend] if draft_model is None else [self.backend, draft_model.backend]

    def close(self) -> None:
        """Free a model that is not being served."""
        self.engine.tokenizer.close()
        for backend in self.backends:
            backend.close()


def build_engine(config: Config, spec: ModelSpec | None = None, on_progress: OnProgress | None = None) -> Assembly:
    """Load a model of the config, by default the first one. Returns when its weights are loaded. Thread-safe.

    `on_progress` gets the name of a stage and the fraction of it that is done. Raises `ModelError` or `ConfigError`.
    """
    spec = spec or config.model[0]
    load = _load_own if config.engine.name is None else _load_from_contract
    tokenizer, backend, path, scoring_head, draft_backend = load(config, spec, on_progress or _ignore)
    defaults = _sampling_defaults(path, spec, backend.info.vocab_size) if path is not None else {}
    for note in backend.info.notes:
        logger.warning("model %s: %s", spec.name, note)
    engine = Engine(
        backend.info,
        tokenizer,
        config.engine,
        config.limits,
        grammar=config.grammar,
        sampling_defaults=defaults,
        scoring_head=scoring_head,
        draft_backend=draft_backend,
    )
    return Assembly(engine, backend)


def _sampling_defaults(path: Path, spec: ModelSpec, vocab_size: int) -> dict[str, Any]:
    """The sampling defaults in the model's files, for requests without their own values. Invalid values are left out.

    The files of the default model have none; it gets the values of its model card.
    """
    from brlite.checkpoint.generation_config import read_recommended_sampling

    if spec.generation_config == "none":
        return {}
    recommended, source = read_recommended_sampling(path), "generation config"
    if not recommended and (spec.name, spec.path) == (DEFAULT_MODEL, None):
        recommended, source = dict(DEFAULT_MODEL_SAMPLING), "model card"
    defaults: dict[str, Any] = {}
    for name, value in recommended.items():
        try:
            defaults[name] = getattr(SamplingParams(**{name: value}), name)
        except InvalidRequest as error:
            logger.warning("model %s: its generation config is not used where %s", spec.name, error)
    if defaults.get("top_k", 0) > vocab_size:
        defaults["top_k"] = -1
    if defaults:
        values = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
        logger.info(
            'model %s: sampling defaults of its %s: %s (generation_config = "none" turns them off)',
            spec.name,
            source,
            values,
        )
    return defaults


class ModelParts(NamedTuple):
    """The parts of a model. `path` is the path of its files, None if the engine has its own tokenizer."""

    tokenizer: Tokenizer
    backend: Backend
    path: Path | None
    scoring_head: ScoringHead | None = None
    draft_backend: Backend | None = None


def _load_own(config: Config, spec: ModelSpec, report: OnProgress) -> ModelParts:
    """Load a model with one of brlite's own backends."""
    from brlite.backends.choose import load_backend
    from brlite.backends.draft import check_draft, load_draft
    from brlite.backends.sizes import settle_context
    from brlite.backends.torch.device import prepare_environment
    from brlite.checkpoint import open_checkpoint
    from brlite.checkpoint.checked_model import check_model
    from brlite.checkpoint.fetch import locate_model
    from brlite.checkpoint.pooling_config import settle_pooling
    from brlite.checkpoint.scoring_head import read_scoring_head

    prepare_environment()
    path = locate_model(spec.name, spec.path, report)
    with closing(open_checkpoint(path, spec.model_file)) as checkpoint, ExitStack() as unless_loaded:
        spec = settle_context(checkpoint.config, spec, config.engine, checkpoint.formats())
        spec = settle_pooling(path, checkpoint.config, spec)
        # Find errors in the files before reading weights and importing torch.
        model = check_model(checkpoint, spec)
        head = read_scoring_head(checkpoint, model)
        scoring_head = None if head is None else ScoringHead(array("f", head[0].tobytes()), head[1])
        report("reading the tokenizer", 0.0)
        tokenizer = _load_tokenizer(path, spec, config.limits)
        unless_loaded.callback(tokenizer.close)
        _check_vocabulary(tokenizer, model.config.vocab_size, path)
        check_draft(spec, config.engine, tokenizer)
        backend = load_backend(checkpoint, model, spec, config.engine, report)
        unless_loaded.callback(backend.close)
        draft_backend = load_draft(spec, config.engine, backend.info, report)
        unless_loaded.pop_all()
        return ModelParts(tokenizer, backend, path, scoring_head, draft_backend)


def _load_from_contract(config: Config, spec: ModelSpec, report: OnProgress) -> ModelParts:
    """Load a model with an engine plugin. The tokenizer is the plugin's, else the one in the model's folder."""
    from brlite.backends.plugins.contract import BringsTokenizer, with_static_context
    from brlite.backends.plugins.discovery import make_engine
    from brlite.backends.plugins.slot_backend import SlotBackend
    from brlite.checkpoint.fetch import default_sources, locate_model

    assert config.engine.name is not None  # checked by build_engine
    spec = with_static_context(spec)
    engine = make_engine(config.engine.name)
    if isinstance(engine, BringsTokenizer):
        if spec.chat_template is not None:
            logger.warning("model %s: chat_template is not used: the engine brings its tokenizer", spec.name)
        report(f"opening engine {config.engine.name}", 0.0)
        return ModelParts(engine.tokenizer(), SlotBackend(engine, spec, config.engine), None)
    path = locate_model(spec.name, spec.path, report, sources=partial(default_sources, is_for_plugin=True))
    tokenizer = _load_tokenizer(path, spec, config.limits)  # first: the engine takes minutes to open
    report(f"opening engine {config.engine.name}", 0.0)
    backend = SlotBackend(engine, spec, config.engine)
    try:
        _check_vocabulary(tokenizer, backend.info.vocab_size, path)
    except ModelError:
        backend.close()
        raise
    return ModelParts(tokenizer, backend, path)


def _load_tokenizer(path: Path, spec: ModelSpec, limits: LimitsConfig) -> Tokenizer:
    return load_tokenizer(
        path,
        chat_template=Path(spec.chat_template) if spec.chat_template else None,
        template_limits=ChildLimits(limits.template_seconds, limits.template_memory_bytes),
        control_tokens_in_text=spec.control_tokens_in_text,
    )


class AsyncEngine(EngineLoop):
    """An engine for asyncio programs: `async with AsyncEngine.from_config(config) as engine: …`."""

    @classmethod
    async def load(
        cls, config: Config, spec: ModelSpec | None = None, on_progress: OnProgress | None = None
    ) -> AsyncEngine:
        """Load a model of the config on another thread and start its engine. The caller closes the engine."""
        check_supported(config)

        def build() -> Assembly:
            assembly = build_engine(config, spec, on_progress)
            if config.grammar.preload:  # now: reading the vocabulary later would block all streams
                (on_progress or _ignore)("reading the vocabulary for grammars", 0.0)
                assembly.engine.compiler.prepare()
            return assembly

        assembly = await _on_a_thread(build, Assembly.close)
        engine = cls(assembly.engine, assembly.backend)
        await engine.start()
        return engine

    @classmethod
    @asynccontextmanager
    async def from_config(
        cls, config: Config, spec: ModelSpec | None = None, on_progress: OnProgress | None = None
    ) -> AsyncIterator[AsyncEngine]:
        """Load a model of the config on another thread. The engine runs inside the block and is closed at its end."""
        engine = await cls.load(config, spec, on_progress)
        try:
            yield engine
        finally:
            await engine.close()


class LLM:
    """Offline inference: `LLM(model="org/name").generate(prompts, SamplingParams(max_tokens=70))`.

    `model` is the name of a model on a hub, a folder or a `.gguf` file. `config_path` is a TOML file or the manual's
    JSON; `config` is a `Config` instead. With one of these, `model` replaces its first model. Without all three, the
    default model is used. Unless a `Config` is given, the environment variable BRLITE_ENGINE may name an engine.
    Code from model folders is never run, even with `trust_remote_code`.

    Any thread may call any method. Calls of `generate` run one after the other. `close` waits for the running step; a
    `generate` on another thread then raises `EngineError`. A forked child cannot use its parent's model.
    """

    def __init__(
        self,
        config_path: str | Path | None = None,
        *,
        model: str | Path | None = None,
        config: Config | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if config is None:
            config = load_config(Path(config_path)) if config_path is not None else Config()
            config = override(config, engine_override(None), source=ENGINE_VARIABLE)
        if model is not None:
            config = override(config, model_override(str(model)), source="LLM")
        check_supported(config)
        for line in config_warnings(config):
            logger.warning("%s", line)
        if trust_remote_code:
            logger.warning("trust_remote_code has no effect: brlite never runs code from a model folder")
        # Offline, a prompt may wait for those before it without a time limit.
        limits = msgspec.structs.replace(config.limits, max_waiting=sys.maxsize, max_wait_seconds=math.inf)
        assembly = build_engine(msgspec.structs.replace(config, limits=limits))
        self._engine, self._backend, self._backends = assembly.engine, assembly.backend, assembly.backends
        self._ids = itertools.count()
        self._is_closed = False
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._generating_thread: int | None = None
        self._finalizer = weakref.finalize(self, close_dropped, "LLM", self._backends)
        self._finalizer.atexit = False  # at the end of the process the system frees everything

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_finished: Callable[[int, RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, given as texts or token ids, with one set of parameters for all or one for each.

        Without `sampling_params`, `get_default_sampling_params()` is used; given ones are used unchanged. Returns one
        finished output for each prompt, in order; the texts are `.outputs[i].text`. `on_finished` is called with the
        index of a prompt, from 0, and its output as soon as it is finished. Raises `InvalidRequest` with the index of
        an invalid prompt, before any prompt runs; `EngineError` if a step failed or the `LLM` is closed; `RuntimeError`
        if called inside `on_finished`.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        params = _one_for_each(
            self.get_default_sampling_params() if sampling_params is None else sampling_params, len(prompts)
        )
        with self._taking_turn():
            requests = [
                self._checked(number, prompt, each)
                for number, (prompt, each) in enumerate(zip(prompts, params, strict=True))
            ]
            try:
                return _Run(self._engine, self._backend, requests, on_finished, params).finish()
            except EngineError:
                self._check_open()
                raise

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one or several conversations, lists of `{"role": …, "content": …}` as in the field `messages`.

        The model's chat template makes the prompts. Returns one output for each conversation. Raises the errors of
        `generate`, and `InvalidRequest` for a model without a chat template.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if is_one else messages
        for each in conversations:
            if not isinstance(each, Sequence) or not all(isinstance(message, Mapping) for message in each):
                wanted = 'a list of {"role": ..., "content": ...}, or a list of such lists'
                raise InvalidRequest(f"messages must be {wanted}, got {each!r:.80}", param="messages")
        return self.generate([self.tokenizer.encode_chat(each) for each in conversations], sampling_params)

    def get_default_sampling_params(self, **given: Any) -> SamplingParams:
        """The defaults of the model's generation config, replaced by what is `given`. The method has vLLM's name."""
        unset = self._engine.sampling_defaults.keys() - given.keys()
        return SamplingParams(**given).with_defaults(self._engine.sampling_defaults, unset)

    def embed(
        self, prompts: str | Sequence[str | Sequence[int]], pooling_params: PoolingParams | None = None
    ) -> list[RequestOutput]:
        """Embed prompts, given as texts or token ids. Returns one output for each, in order, with its `.embedding`.

        An embedding is an array of float32; `list` and `numpy.asarray` convert it. Raises the errors of `generate`.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        pooling = pooling_params or PoolingParams()
        with self._taking_turn():
            requests = [
                self._checked(number, prompt, SamplingParams(), pooling) for number, prompt in enumerate(prompts)
            ]
            try:
                return _Run(self._engine, self._backend, requests, None).finish()
            except EngineError:
                self._check_open()
                raise

    def check(self, prompt: str | Sequence[int], params: SamplingParams) -> None:
        """Raise `InvalidRequest` for a prompt that `generate` would refuse."""
        self._engine.check(self._request(prompt, params))

    def close(self) -> None:
        """Free weights and cache after the running step. May be called twice, and inside `on_finished`."""
        self._is_closed = True
        self._finalizer.detach()
        self.tokenizer.close()
        for backend in self._backends:
            backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM cannot be pickled or copied: it holds a loaded model; send its Config and load it there"
        )

    @contextmanager
    def _taking_turn(self) -> Iterator[None]:
        """Wait until no other thread generates. Raises `EngineError` if the model is closed, or in a forked child."""
        check_process(self._pid)
        if self._generating_thread == threading.get_ident():
            raise RuntimeError("LLM.generate was called inside a callback of LLM.generate; call it after that returns")
        with self._turn:
            self._check_open()
            self._generating_thread = threading.get_ident()
            try:
                yield
            finally:
                self._generating_thread = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the LLM is closed")

    def _checked(
        self, number: int, prompt: str | Sequence[int], params: SamplingParams, pooling: PoolingParams | None = None
    ) -> Request:
        try:
            request = self._request(prompt, params, pooling)
            self._engine.check(request)
        except InvalidRequest as error:
            raise type(error)(f"prompts[{number}]: {error}", param=error.param, code=error.code) from None
        return request

    def _request(
        self, prompt: str | Sequence[int], params: SamplingParams, pooling: PoolingParams | None = None
    ) -> Request:
        return Request(
            request_id=str(next(self._ids)),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=self.tokenizer.encode(prompt, param="prompt")
            if isinstance(prompt, str)
            else read_token_ids(prompt),
            params=params if params.best_of is None else params.for_all_answers(),
            grammar=self._engine.compiler.compile_on_thread(params.structured),
            bad_words=self._engine.encode_bad_words(params),
            group="generate",  # the requests of one call share one turn in the queue
            pooling=pooling,
        )


class _Run:
    """One call of `generate`: queues at most one batch of requests in the engine, and collects their outputs."""

    def __init__(
        self,
        engine: Engine,
        backend: Backend,
        requests: list[Request],
        on_finished: Callable[[int, RequestOutput], object] | None,
        params: Sequence[SamplingParams] = (),
    ) -> None:
        """`params` are the caller's parameters, which still have `best_of`. Those of `requests` do not."""
        self._engine = engine
        self._backend = backend
        self._requests = requests
        self._on_finished = on_finished
        self._best_of = {
            request.request_id: each for request, each in zip(requests, params, strict=False) if each.ranks_answers
        }
        self._numbers = {request.request_id: number for number, request in enumerate(requests)}
        self._outputs: dict[str, RequestOutput] = {}
        self._finished: list[RequestOutput] = []
        self._error: BrliteError | None = None

    def finish(self) -> list[RequestOutput]:
        waiting, draft_model = iter(self._requests), self._engine.draft_model
        masks = ThreadPoolExecutor(1, thread_name_prefix="brlite-masks")  # the thread starts with the first mask
        try:
            while self._error is None:
                while len(self._engine.queued()) < self._engine.info.max_num_seqs and (request := next(waiting, None)):
                    self._engine.add_request(request, self._receive)
                if draft_model is not None and (plan := self._engine.plan_drafts()) is not None:
                    self._engine.take_drafts(plan, draft_model.run(plan))
                batch = self._engine.schedule()
                if batch is None:
                    return [self._outputs[request.request_id] for request in self._requests]
                if self._engine.guidance is not None:
                    masks.submit(self._engine.guidance.fill)
                self._engine.update(self._backend.execute(batch))
                # Not in `_receive`: the engine catches errors of its sinks. `on_finished` must raise to the caller.
                finished, self._finished = self._finished, []
                if self._on_finished is not None:
                    for output in finished:
                        self._on_finished(self._numbers[output.request_id], output)
            raise self._error
        except BaseException as error:
            # After any error, also Ctrl-C, empty the engine for the next call.
            self._engine.end_all(error if isinstance(error, BrliteError) else EngineError("generation was interrupted"))
            raise
        finally:
            masks.shutdown()

    def _receive(self, output: RequestOutput | BrliteError) -> None:
        if isinstance(output, BrliteError):
            self._error = output
            return
        whole = self._outputs.setdefault(output.request_id, output)
        if whole is not output:
            whole.merge(output)
        if output.finished:
            whole.outputs.sort(key=lambda completion: completion.index)
            if (params := self._best_of.get(output.request_id)) is not None:
                whole.keep_best(params.n, keeps_logprobs=params.logprobs is not None)
            self._finished.append(whole)


def _one_for_each(params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequest(
            f"sampling_params has {len(params)} entries for {num_prompts} prompts; give one, or one for each",
            param="sampling_params",
        )
    return params


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    highest = max((tokenizer.vocab_size - 1, *tokenizer.eos_token_ids))
    if highest >= vocab_size:
        raise ModelError(f"{path}: the tokenizer has token ids up to {highest}, the model only up to {vocab_size - 1}")


async def model_bytes(config: Config, spec: ModelSpec, on_progress: OnProgress | None = None) -> int:
    """The bytes of a model's weights and KV cache. If the model is not local, downloads it on another thread."""
    from brlite.backends.sizes import sizes_at
    from brlite.checkpoint.fetch import locate_model

    def measure() -> int:
        path = locate_model(spec.name, spec.path, on_progress or _ignore)
        return sizes_at(path, spec, config.engine).num_bytes

    return await _on_a_thread(measure, lambda _: None)


class EngineLoader:
    """Loads the models of a config, for `server.model_manager`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    async def known_bytes(self, spec: ModelSpec) -> int | None:
        """0 for a model of an engine plugin; None for others: `measure` finds it once the files are local."""
        return 0 if self.config.engine.name is not None else None

    async def measure(self, spec: ModelSpec, report: OnProgress) -> int:
        return await model_bytes(self.config, spec, report)

    async def load(self, spec: ModelSpec, report: OnProgress) -> AsyncEngine:
        return await AsyncEngine.load(self.config, spec, report)

    def settle(self) -> None:
        gc.collect()


async def _on_a_thread(work: Callable[[], T], drop: Callable[[T], None]) -> T:
    """Run `work` on a daemon thread. If the caller is cancelled, `drop` is called with the later result, if any."""

    def drop_result(done: Future[T]) -> None:
        if done.exception() is None:
            drop(done.result())

    done = start_daemon(work, "brlite-load")
    try:
        return await asyncio.wrap_future(done)
    except asyncio.CancelledError:
        done.add_done_callback(drop_result)
        raise


def _ignore(stage: str, fraction: float) -> None:
    """The default `on_progress`: does nothing."""

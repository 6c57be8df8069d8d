"""`LLM`: offline inference, without an event loop. Each call steps the engine until its outputs are complete."""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from brlite.backends.guard import check_process
from brlite.config.load import load_config
from brlite.config.options import ENGINE_VARIABLE, Config
from brlite.config.validation import engine_override, model_override, override
from brlite.config.warnings import check_supported, config_warnings
from brlite.engine.admission import read_token_ids
from brlite.engine.backend import Backend, close_all, close_dropped
from brlite.engine.engine import Engine
from brlite.engine.outputs import RequestOutput
from brlite.engine.request import Request
from brlite.engine.scoring import SCORING
from brlite.errors import BrliteError, EngineError, InvalidRequest
from brlite.llm.loading import build_engine
from brlite.sampling_params import PoolingParams, SamplingParams
from brlite.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class LLM:
    """Offline inference: `LLM(model="org/name").generate(prompts, SamplingParams(max_tokens=70))`.

    `model` is the name of a model on a hub, a folder or a `.gguf` file. `config_path` is a TOML file or the manual's
    JSON; `config` is a `Config` instead. With one of these, `model` replaces its only model. Without all three, the
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
        config = override(config, model_override(None if model is None else str(model)), source="LLM")
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
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequest(
                f"sampling_params has {len(params)} entries for {len(prompts)} prompts; give one, or one for each",
                param="sampling_params",
            )
        return self._run(prompts, params, on_finished=on_finished)

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
        return self._run(prompts, [SamplingParams()] * len(prompts), pooling=pooling_params or PoolingParams())

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        use_activation: bool | None = None,
        instruction: str | None = None,
    ) -> list[float]:
        """Score how well texts go together, with a model made for that. The method has vLLM's name.

        `text_1` is one text for all of `text_2`, or has as many. Returns one number for each pair, in order: from 0 to
        1, or with `use_activation=False` the logit. `instruction` says what goes together, in place of the default in
        the model's template. Raises the errors of `generate`, and `InvalidRequest` for a model without a scoring head
        or an instruction for which its template has no place.
        """
        head = self._engine.scoring_head
        if head is None:
            raise InvalidRequest("this model has no scoring head", param="model", code="no_scoring_head")
        head.check_instruction(instruction)
        firsts, seconds = ([text] if isinstance(text, str) else list(text) for text in (text_1, text_2))
        if len(firsts) not in (1, len(seconds)):
            raise InvalidRequest(
                f"text_1 must be one text, or as many as text_2 has ({len(seconds)}), got {len(firsts)}", param="text_1"
            )
        pairs = zip(firsts * len(seconds) if len(firsts) == 1 else firsts, seconds, strict=True)
        encode = self.tokenizer.encode
        prompts = [
            encode(first) + encode(second)
            if head.template is None
            else encode(head.template.fill(first, second, instruction))
            for first, second in pairs
        ]
        scores = []
        for output in self._run(prompts, [SamplingParams()] * len(prompts), pooling=SCORING):
            assert output.embedding is not None, "each request is one for pooling"
            scores.append(head.score(output.embedding, use_activation=use_activation))
        return scores

    def check(self, prompt: str | Sequence[int], params: SamplingParams) -> None:
        """Raise `InvalidRequest` for a prompt that `generate` would refuse."""
        self._engine.check(self._request(prompt, params))

    def close(self) -> None:
        """Free weights and cache after the running step. May be called twice, and inside `on_finished`."""
        self._is_closed = True
        self._finalizer.detach()
        close_all([self.tokenizer, *self._backends])

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
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
            except EngineError:
                self._check_open()  # if the model was closed, the error says so, not how its step failed
                raise
            finally:
                self._generating_thread = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the LLM is closed")

    def _run(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        on_finished: Callable[[int, RequestOutput], object] | None = None,
        pooling: PoolingParams | None = None,
    ) -> list[RequestOutput]:
        """Check all prompts, then run them. Returns one output for each, in order."""
        with self._taking_turn():
            requests = list[Request]()
            for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
                try:
                    requests.append(self._request(prompt, each, pooling))
                    self._engine.check(requests[-1])
                except InvalidRequest as error:
                    raise type(error)(f"prompts[{number}]: {error}", param=error.param, code=error.code) from None
            return _Run(self._engine, self._backend, requests, on_finished, params).finish()

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
            processors=self._engine.processor_maker.make(params),
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
        params: Sequence[SamplingParams],
    ) -> None:
        """`params` are the caller's parameters, which still have `best_of`. Those of `requests` do not."""
        self._engine = engine
        self._backend = backend
        self._requests = requests
        self._on_finished = on_finished
        self._best_of = {
            request.request_id: each for request, each in zip(requests, params, strict=True) if each.ranks_answers
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
        except Exception:  # empty the engine for the next call
            try:
                self._engine.end_all(partial(EngineError, "generation was interrupted"))
            except BaseException:
                self._engine.reset()
                raise
            raise
        except BaseException:
            self._engine.reset()
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

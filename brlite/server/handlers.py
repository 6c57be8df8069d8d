"""One coroutine for each endpoint: read, find the model, translate, hand to the engine, answer. `ROUTES` lists them.

No field is interpreted here and no byte is framed: `translate.py`, `answers.py` and `delivery.py` do that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import msgspec
from aiohttp import web
from msgspec import UNSET

import brlite
from brlite.config import Config, LimitsConfig
from brlite.engine.async_engine import AsyncEngine
from brlite.http.access_log import log_extras
from brlite.http.body import leave_body, read_body
from brlite.http.decode import decode_json, unknown_fields
from brlite.http.keys import KEYS, admitted, api_key, spend_tokens
from brlite.sampling_params import SamplingParams, check_token_ids
from brlite.server import metrics
from brlite.server.answers import ChatAnswer, CompletionAnswer
from brlite.server.checks import check_num_tokens, check_tokenize
from brlite.server.delivery import Collector, answer_stream, answer_whole
from brlite.server.elsewhere import forwarded_card, forwarded_progress
from brlite.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    SamplingFields,
    TokenizeAnswer,
    TokenizeRequest,
    encode,
)
from brlite.server.served_model import ModelTable, ServedModel
from brlite.server.translate import (
    Prompt,
    chat_params,
    check_chat,
    check_completion,
    completion_params,
    in_the_words_of,
    make_requests,
    plain_messages,
)

T = TypeVar("T", bound=msgspec.Struct)

CONFIG = web.AppKey("config", Config)
MODELS = web.AppKey("models", ModelTable)
# Adds the metrics of the upstreams, of one by its name or of `all`, to a text of ours.
ADD_METRICS: web.AppKey[Callable[[bytes, str], Awaitable[bytes]]] = web.AppKey("add_metrics")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    body, warnings = await _read(request, _CHAT)
    with _using(request, body.model) as model:
        with in_the_words_of(body):
            messages = check_chat(body, _limits(request))
            params = chat_params(body, _limits(request))
        answer = ChatAnswer(body.model, n=params.n, include_usage=_includes_usage(body), warnings=warnings)

        async def encode(engine: AsyncEngine) -> list[Prompt]:
            return [Prompt(None, await engine.encode_chat(messages, add_generation_prompt=body.add_generation_prompt))]

        return await _answer(request, model, body, encode, params, answer)


async def completions(request: web.Request) -> web.StreamResponse:
    body, warnings = await _read(request, _COMPLETION)
    with _using(request, body.model) as model:
        with in_the_words_of(body):
            prompts = check_completion(body, _limits(request))
            params = completion_params(body, _limits(request))
        answer = CompletionAnswer(
            body.model,
            n=params.n,
            echo=bool(body.echo),
            is_echo_only=bool(body.echo) and body.max_tokens == 0,
            include_usage=_includes_usage(body),
            warnings=warnings,
        )
        return await _answer(request, model, body, partial(_encode_all, prompts), params, answer)


async def tokenize(request: web.Request) -> web.Response:
    body, warnings = await _read(request, _TOKENIZE)
    with _using(request, body.model) as model:
        check_tokenize(body)
        messages = None if body.messages is None else plain_messages(body.messages, _limits(request))
        engine = await model.loaded(_limits(request).max_wait_seconds)
        if messages is not None:
            tokens = await engine.encode_chat(messages, add_generation_prompt=body.add_generation_prompt is not False)
        else:
            tokens = await engine.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    return _json(TokenizeAnswer(len(tokens), engine.info.max_model_len, tokens, warnings or UNSET))


async def detokenize(request: web.Request) -> web.Response:
    body, warnings = await _read(request, _DETOKENIZE)
    with _using(request, body.model) as model:
        check_num_tokens(len(body.tokens), model.max_model_len)
        engine = await model.loaded(_limits(request).max_wait_seconds)
        check_token_ids(body.tokens, engine.info.vocab_size, param="tokens")
        text = engine.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return _json(DetokenizeAnswer(text, warnings or UNSET))


async def list_models(request: web.Request) -> web.Response:
    """Those that the key may use and, of those that other servers have, that can be reached."""
    models, may_use = request.app[MODELS], api_key(request).may_use
    here = [_card(name, model) for name, model in models.names() if may_use(model.name)]
    elsewhere = [forwarded_card(model) for model in models.forwarded if model.num_available and may_use(model.model)]
    return _json(ModelList(data=here + elsewhere))


async def get_model(request: web.Request) -> web.Response:
    name, models = request.match_info["name"], request.app[MODELS]
    forwarded = models.find_forwarded(name)
    api_key(request).check_model(models.resolve(name) if forwarded is None else forwarded.model)
    return _json(_card(name, models.find(name)) if forwarded is None else forwarded_card(forwarded))


async def version(request: web.Request) -> web.Response:
    return web.json_response({"version": brlite.__version__})


async def health(request: web.Request) -> web.Response:
    """Alive: 200 unless an engine's loop has died, which only a restart mends."""
    is_alive = all(model.is_alive for model in request.app[MODELS])
    return web.json_response({"status": "alive" if is_alive else "failed"}, status=200 if is_alive else 500)


async def ready(request: web.Request) -> web.Response:
    """Serving: 200 if new work is taken, else 503; with how far each model is, and who else can be reached."""
    models = request.app[MODELS]
    is_ready = models.takes_requests
    progress: list[dict[str, object]] = [
        {
            "model": model.name,
            "status": model.status,
            "stage": model.loading.stage,
            "progress": round(model.loading.fraction, 3),
        }
        for model in models
    ]
    forwarded = [forwarded_progress(model) for model in models.forwarded if model.name == model.model]
    return web.json_response(
        {"status": models.status, "models": progress, **({"forwarded": forwarded} if forwarded else {})},
        status=200 if is_ready else 503,
        headers={} if is_ready else {"Retry-After": "1"},
    )


async def get_metrics(request: web.Request) -> web.Response:
    """Our own numbers and, with `?upstream=NAME` or `all`, those of upstreams; then always in the text format."""
    app, which = request.app, request.query.get("upstream")
    accept = request.headers.get("Accept", "") if which is None else ""
    body, content_type = metrics.render(app[MODELS], app[KEYS], app[metrics.COLLECTORS], accept)
    if which is not None:
        body = await app[ADD_METRICS](body, which)
    return web.Response(body=body, headers={"Content-Type": content_type})


ROUTES = [
    web.post("/v1/chat/completions", chat_completions, expect_handler=leave_body),
    web.post("/v1/completions", completions, expect_handler=leave_body),
    web.get("/v1/models", list_models),
    web.get("/v1/models/{name:.+}", get_model),
    web.post("/tokenize", tokenize, expect_handler=leave_body),
    web.post("/detokenize", detokenize, expect_handler=leave_body),
    web.get("/version", version),
    web.get("/health", health),
    web.get("/ready", ready),
    web.get("/metrics", get_metrics),
    web.get("/metrics/", get_metrics),
]
OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS_PATHS = frozenset({"/metrics", "/metrics/"})

_CHAT = msgspec.json.Decoder(ChatCompletionRequest)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def _read(request: web.Request, decoder: msgspec.json.Decoder[T]) -> tuple[T, list[str]]:
    """The decoded body, and a warning for each field that is not known here."""
    limits = _limits(request)
    data = await read_body(request, limits.max_body_bytes, limits.body_seconds)
    body = decode_json(data, decoder)
    return body, [f"the field {name!r} is not known and was ignored" for name in unknown_fields(data, type(body))]


@contextmanager
def _using(request: web.Request, name: str | None) -> Iterator[ServedModel]:
    """The request's place under its key, and its model, which is not unloaded meanwhile.

    The key is asked first: it does not tell which other models there are.
    """
    models = request.app[MODELS]
    whole_name = models.find(None).name if name is None else models.resolve(name)
    with admitted(request, whole_name), models.use(whole_name, _limits(request).max_waiting) as model:
        yield model


async def _encode_all(prompts: list[Prompt], engine: AsyncEngine) -> list[Prompt]:
    return [
        Prompt(prompt.text, await engine.encode(prompt.text)) if prompt.text is not None else prompt
        for prompt in prompts
    ]


async def _answer(
    request: web.Request,
    model: ServedModel,
    body: SamplingFields,
    encode: Callable[[AsyncEngine], Awaitable[list[Prompt]]],
    params: SamplingParams,
    answer: ChatAnswer | CompletionAnswer,
) -> web.StreamResponse:
    """Hand the prompts to the model's engine, once it is loaded, and answer in the form that was asked for."""

    async def ask(engine: AsyncEngine, collector: Collector) -> None:
        answer.set_source(engine.tokenizer, engine.info.fingerprint)
        with in_the_words_of(body):
            prompts = await encode(engine)
            collector.submit(engine, make_requests(answer.id, prompts, params, body.cache_salt))

    try:
        if body.stream:
            return await answer_stream(request, model, ask, answer, _limits(request))
        return await answer_whole(request, model, ask, answer, _limits(request))
    finally:
        spend_tokens(request, answer.count.prompt, answer.count.completion)
        log_extras(request).update(
            model=body.model, prompt_tokens=answer.count.prompt, completion_tokens=answer.count.completion
        )


def _includes_usage(body: SamplingFields) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _limits(request: web.Request) -> LimitsConfig:
    return request.app[CONFIG].limits


def _card(name: str, model: ServedModel) -> ModelCard:
    return ModelCard(
        id=name, created=model.created, root=model.name, max_model_len=model.max_model_len, status=model.status
    )


def _json(answer: msgspec.Struct) -> web.Response:
    return web.Response(body=encode(answer), content_type="application/json")

"""One coroutine for each endpoint: read, find the model, translate, hand to the engine, answer. `ROUTES` lists them.

No field is interpreted here and no byte is framed: `translate.py`, `answers.py` and `delivery.py` do that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec
from aiohttp import web
from msgspec import UNSET

import brlite
from brlite.config.options import Config
from brlite.engine.async_engine import EngineLoop
from brlite.errors import Forbidden, NotFound
from brlite.http.access_log import log_extras
from brlite.http.body import leave_body, read_body
from brlite.http.decode import decode_fields, decode_json
from brlite.http.keys import KEYS, admitted, api_key, shown_api_key, spend_tokens
from brlite.sampling_params import SamplingParams, check_token_ids
from brlite.server import metrics
from brlite.server.answers import ChatAnswer, CompletionAnswer
from brlite.server.checks import check_tokenize, generation_prompt
from brlite.server.delivery import Collector, answer_stream, answer_whole
from brlite.server.fields import check_undecoded
from brlite.server.logprobs import TokenNames
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
    TokenizerInfo,
    encode,
)
from brlite.server.remote_models import forwarded_card, forwarded_progress
from brlite.server.served_model import ModelTable, ServedModel
from brlite.server.translate import (
    Prompt,
    answer_form,
    chat_params,
    check_chat,
    check_completion,
    client_field_names,
    completion_params,
    make_requests,
    plain_messages,
    truncate,
)

T = TypeVar("T", bound=msgspec.Struct)

CONFIG = web.AppKey("config", Config)
MODELS = web.AppKey("models", ModelTable)
# Adds the metrics of the upstreams, of one by its name or of `all`, to a text of ours.
ADD_METRICS: web.AppKey[Callable[[bytes, str], Awaitable[bytes]]] = web.AppKey("add_metrics")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    body, warnings = await _read(request, _CHAT)
    limits, tenant = request.app[CONFIG].limits, api_key(request).tenant
    with _using(request, body.model) as model:
        with client_field_names(body):
            messages = check_chat(body, limits)
            params = chat_params(body, limits)
            has_generation_prompt = generation_prompt(
                add=body.add_generation_prompt, continues=body.continue_final_message
            )
        answer = ChatAnswer(answer_form(body, body.model or model.name, params))
        answer.warn(warnings)

        async def encode(engine: EngineLoop) -> list[Prompt]:
            token_ids = await engine.encode_chat(
                messages,
                add_generation_prompt=has_generation_prompt,
                continue_final_message=bool(body.continue_final_message),
                is_bounded=body.truncate_prompt_tokens is None,
                tenant=tenant,
            )
            return [Prompt(None, token_ids)]

        return await _answer(request, model, body, encode, params, answer)


async def completions(request: web.Request) -> web.StreamResponse:
    body, warnings = await _read(request, _COMPLETION)
    limits, tenant = request.app[CONFIG].limits, api_key(request).tenant
    with _using(request, body.model) as model:
        with client_field_names(body):
            prompts = check_completion(body, limits)
            params = completion_params(body, limits)
        answer = CompletionAnswer(answer_form(body, body.model or model.name, params))
        answer.warn(warnings)

        async def encode(engine: EngineLoop) -> list[Prompt]:
            return [
                Prompt(
                    prompt.text,
                    await engine.encode(
                        prompt.text,
                        add_special_tokens=body.add_special_tokens is not False,
                        is_bounded=body.truncate_prompt_tokens is None,
                        tenant=tenant,
                    ),
                )
                if prompt.text is not None
                else prompt
                for prompt in prompts
            ]

        return await _answer(request, model, body, encode, params, answer)


async def tokenize(request: web.Request) -> web.Response:
    """Count and show the tokens of a text of any length: only the body's size is limited."""
    body, warnings = await _read(request, _TOKENIZE)
    limits, tenant = request.app[CONFIG].limits, api_key(request).tenant
    with _using(request, body.model) as model:
        check_tokenize(body)
        has_generation_prompt = generation_prompt(add=body.add_generation_prompt, continues=body.continue_final_message)
        messages = None if body.messages is None else plain_messages(body.messages, limits)
        engine = await model.loaded(limits.max_wait_seconds, tenant)
        if messages is not None:
            tokens = await engine.encode_chat(
                messages,
                add_generation_prompt=has_generation_prompt,
                continue_final_message=bool(body.continue_final_message),
                is_bounded=False,
                tenant=tenant,
            )
        else:
            tokens = await engine.encode(
                body.prompt or "",
                add_special_tokens=body.add_special_tokens is not False,
                is_bounded=False,
                tenant=tenant,
            )
        names = TokenNames(engine.tokenizer)
        named = {token_id: names(token_id) for token_id in set(tokens)} if body.return_token_strs else {}
        token_strs = [named[token_id] for token_id in tokens] if body.return_token_strs else UNSET
    return _json(TokenizeAnswer(len(tokens), engine.info.max_model_len, tokens, token_strs, warnings or UNSET))


async def detokenize(request: web.Request) -> web.Response:
    body, warnings = await _read(request, _DETOKENIZE)
    with _using(request, body.model) as model:
        engine = await model.loaded(request.app[CONFIG].limits.max_wait_seconds, api_key(request).tenant)
        check_token_ids(body.tokens, engine.info.vocab_size, param="tokens")
        text = await engine.decode(body.tokens, tenant=api_key(request).tenant)
    return _json(DetokenizeAnswer(text, warnings or UNSET))


async def tokenizer_info(request: web.Request) -> web.Response:
    """The first request of lm-eval. The query parameter `model` is needed where several models are served."""
    with _using(request, request.query.get("model")) as model:
        engine = await model.loaded(request.app[CONFIG].limits.max_wait_seconds, api_key(request).tenant)
        tokenizer = engine.tokenizer
        bos, eos = tokenizer.bos_token_id, next(iter(tokenizer.eos_token_ids), None)
        info = TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            bos_token=None if bos is None else tokenizer.token_text(bos),
            eos_token=None if eos is None else tokenizer.token_text(eos),
            pad_token=None,
            chat_template=tokenizer.chat_template_text,
            model_max_length=engine.info.max_model_len,
            vocab_size=tokenizer.vocab_size,
        )
    return _json(info)


async def not_built(request: web.Request) -> web.Response:
    """An endpoint that brlite does not have: 404, since gateways count a 5xx as a failure of the server."""
    raise NotFound(
        f"{request.path[:200]} is not supported by this version of brlite; it has {', '.join(PATHS)}",
        code="unsupported_endpoint",
    )


async def list_models(request: web.Request) -> web.Response:
    """The models that the key may use; of remote ones, those with a reachable upstream."""
    models, may_use = request.app[MODELS], api_key(request).may_use
    here = [_card(name, model) for name, model in models.names() if may_use(model.name)]
    remote = [forwarded_card(model) for model in models.forwarded if model.num_available and may_use(model.model)]
    return _json(ModelList(data=here + remote))


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
    """Serving: 200 if new work is accepted, else 503.

    With an accepted key also the state of each model that the key may use, and the number of its upstreams.
    """
    models, key = request.app[MODELS], shown_api_key(request)
    is_ready = models.takes_requests
    answer: dict[str, object] = {"status": models.status}
    if key is not None:
        answer["models"] = [
            {
                "model": model.name,
                "status": model.status,
                "stage": model.loading.stage,
                "progress": round(model.loading.fraction, 3),
            }
            for model in models
            if key.may_use(model.name)
        ]
        forwarded = [model for model in models.forwarded if model.name == model.model and key.may_use(model.model)]
        if forwarded:
            answer["forwarded"] = [forwarded_progress(model) for model in forwarded]
    return web.json_response(answer, status=200 if is_ready else 503, headers={} if is_ready else {"Retry-After": "1"})


async def get_metrics(request: web.Request) -> web.Response:
    """Our own numbers and, with `?upstream=NAME` or `all`, those of upstreams.

    Where keys have names, all but the process's own numbers need an operator's key: they show names of models and keys.
    """
    app, which, keys = request.app, request.query.get("upstream"), request.app[KEYS]
    may_see_names = keys.may_see_all(shown_api_key(request))
    collectors = metrics.named_collectors(app[MODELS], keys, app[metrics.COLLECTORS]) if may_see_names else ()
    body, content_type = metrics.render(collectors)
    if which is not None:
        if not may_see_names:
            raise Forbidden("metrics of upstreams need an operator's key (admin = true)", param="upstream")
        body = await app[ADD_METRICS](body, which)
    return web.Response(body=body, headers={"Content-Type": content_type})


_POSTS = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
_GETS = {"/v1/models": list_models, "/tokenizer_info": tokenizer_info, "/version": version}
_PROBES = {"/health": health, "/ready": ready, "/metrics": get_metrics}
PATHS = (*_POSTS, *_GETS)
NOT_BUILT = (
    *("/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/rerank", "/v1/score"),
    *("/v1/classify", "/v1/pooling", "/v1/moderations", "/v1/images/generations", "/v1/images/edits"),
    *("/v1/images/variations", "/v1/audio/speech", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/files"),
    *("/v1/batches", "/v1/uploads", "/v1/fine_tuning/jobs", "/v1/vector_stores", "/v1/assistants", "/v1/threads"),
    *("/v1/realtime", "/v2/rerank", "/rerank", "/score", "/classify", "/pooling", "/embedding", "/infill"),
    *("/completion", "/apply-template", "/generate", "/api/chat", "/api/generate", "/api/tags", "/api/embed"),
)


def spellings(path: str, end: str = "/*") -> str:
    """A route's pattern for a path as clients spell it: doubled and trailing slashes, `/v1` left out or put before."""
    first, *others = path.removeprefix("/v1").strip("/").split("/")
    inner = "".join(f"{{s{index}:/+}}{part}" for index, part in enumerate(others))
    return f"/{{v1:(?:/*v1/+)*/*}}{first}{inner}{{end:{end}}}"


ROUTES = [
    *(web.post(path, handler, expect_handler=leave_body) for path, handler in _POSTS.items()),
    web.get("/v1/models/{name:[^/].*}", get_model),
    web.get("/models/{name:[^/].*}", get_model),
    *(web.get(path, handler) for path, handler in _GETS.items()),
    *(web.get(path, handler) for path, handler in _PROBES.items()),
    *(web.get(f"{path}/", handler) for path, handler in _PROBES.items()),
    # Behind the usual spellings, which are found by their text.
    *(web.post(spellings(path), handler, expect_handler=leave_body) for path, handler in _POSTS.items()),
    *(web.get(spellings(path), handler) for path, handler in (*_GETS.items(), *_PROBES.items())),
    *(web.route("*", spellings(path, end="(?:/.*)?"), not_built, expect_handler=leave_body) for path in NOT_BUILT),
]
OPEN_PATHS = frozenset({"/health", "/health/", "/ready", "/ready/"})
METRICS_PATHS = frozenset({"/metrics", "/metrics/"})

_CHAT = msgspec.json.Decoder(ChatCompletionRequest)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def _read(request: web.Request, decoder: msgspec.json.Decoder[T]) -> tuple[T, list[str]]:
    """The decoded body, and a warning for each unknown field. Raises for known fields that are not supported."""
    limits = request.app[CONFIG].limits
    data = await read_body(request, limits.max_body_bytes, limits.body_seconds)
    body = decode_json(data, decoder)
    known = frozenset(type(body).__struct_encode_fields__)
    return body, check_undecoded({name: raw for name, raw in decode_fields(data).items() if name not in known})


@contextmanager
def _using(request: web.Request, name: str | None) -> Iterator[ServedModel]:
    """Hold a place under the request's key, and its model, which is not unloaded inside.

    The key is checked first, so that a client without access cannot find out model names.
    """
    models = request.app[MODELS]
    whole_name = models.resolve(name) if name else models.find(None).name
    max_waiting, tenant = request.app[CONFIG].limits.max_waiting, api_key(request).tenant
    with admitted(request, whole_name), models.use(whole_name, max_waiting, tenant) as model:
        yield model


async def _answer(
    request: web.Request,
    model: ServedModel,
    body: SamplingFields,
    encode: Callable[[EngineLoop], Awaitable[list[Prompt]]],
    params: SamplingParams,
    answer: ChatAnswer | CompletionAnswer,
) -> web.StreamResponse:
    """Hand the prompts to the model's engine, once it is loaded, and answer in the form that was asked for."""

    async def ask(engine: EngineLoop, collector: Collector) -> None:
        answer.set_source(engine.tokenizer, engine.info.fingerprint)
        with client_field_names(body):
            prompts, cuts = truncate(await encode(engine), body, params, engine.info)
            answer.warn(cuts)
            collector.submit(
                engine, make_requests(answer.id, prompts, params, body.cache_salt, api_key(request).tenant)
            )

    try:
        if body.stream:
            return await answer_stream(request, model, ask, answer, request.app[CONFIG].limits)
        return await answer_whole(request, model, ask, answer, request.app[CONFIG].limits)
    finally:
        spend_tokens(request, answer.count.prompt, answer.count.completion)
        log_extras(request).update(
            model=body.model or model.name, prompt_tokens=answer.count.prompt, completion_tokens=answer.count.completion
        )


def _card(name: str, model: ServedModel) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        root=model.name,
        max_model_len=model.max_model_len or UNSET,
        status=model.status,
    )


def _json(answer: msgspec.Struct) -> web.Response:
    return web.Response(body=encode(answer), content_type="application/json")

"""One coroutine for each endpoint, and `ROUTES`, which lists them. `generate.py` is the place to start.

No field is interpreted here and no byte is framed: `dialects/` decode and encode, `delivery.py` sends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import UNSET, UnsetType

import brlite
from brlite.chat.turns import NO_EXTRAS
from brlite.dialects import DIALECTS
from brlite.dialects.generation import Chat
from brlite.dialects.openai import encode_json, token_name
from brlite.dialects.openai_tokens import (
    DetokenizeAnswer,
    TokenizeAnswer,
    TokenizerInfo,
    decode_detokenize,
    decode_tokenize,
)
from brlite.errors import Forbidden, NotFound
from brlite.http.body import leave_body, read_body
from brlite.http.keys import API_KEY, KEYS, shown_api_key
from brlite.sampling_params import check_token_ids
from brlite.server import metrics
from brlite.server.chat_replies import template_extras
from brlite.server.engine_requests import encode
from brlite.server.event_builder import token_text
from brlite.server.generate import CONFIG, MODELS, admit, generate
from brlite.server.model_list import ModelList, forwarded_card, forwarded_progress, local_card
from brlite.server.response_store import STORE
from brlite.server.responses import (
    cancel_response,
    count_input_tokens,
    create_response,
    delete_response,
    get_response,
    list_input_items,
)

# Adds the metrics of the upstreams, of one by its name or of `all`, to a text of ours.
ADD_METRICS: web.AppKey[Callable[[bytes, str], Awaitable[bytes]]] = web.AppKey("add_metrics")


async def tokenize(request: web.Request) -> web.Response:
    """Count and show the tokens of a text of any length: only the body's size is limited."""
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    call = decode_tokenize(await read_body(request, limits.max_body_bytes, limits.body_seconds), limits)
    with admit(request, call.model) as model:
        engine = await model.loaded(limits.max_wait_seconds, tenant)
        extras, ignored = NO_EXTRAS, list[str]()
        if isinstance(call.prompt, Chat):
            extras, ignored = template_extras(call.prompt, engine.tokenizer.chat_format, model.spec)
        tokens = await encode(call.prompt, engine, tenant, extras=extras, is_bounded=False)
        token_strs: list[str] | UnsetType = UNSET
        if call.names_tokens:
            named = {token_id: token_name(token_text(token_id, engine.tokenizer)) for token_id in set(tokens)}
            token_strs = [named[token_id] for token_id in tokens]
    return _json(
        TokenizeAnswer(len(tokens), engine.info.max_model_len, tokens, token_strs, (*call.warnings, *ignored) or UNSET)
    )


async def detokenize(request: web.Request) -> web.Response:
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    body, warnings = decode_detokenize(await read_body(request, limits.max_body_bytes, limits.body_seconds))
    with admit(request, body.model) as model:
        engine = await model.loaded(limits.max_wait_seconds, tenant)
        check_token_ids(body.tokens, engine.info.vocab_size, param="tokens")
        text = await engine.decode(body.tokens, tenant=tenant)
    return _json(DetokenizeAnswer(text, warnings or UNSET))


async def tokenizer_info(request: web.Request) -> web.Response:
    """The first request of lm-eval. The query parameter `model` is needed where several models are served."""
    with admit(request, request.query.get("model")) as model:
        engine = await model.loaded(request.app[CONFIG].limits.max_wait_seconds, request[API_KEY].tenant)
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
        f"unknown endpoint: {request.path[:200]} is not in this version of brlite; it has {', '.join(PATHS)}",
        code="unsupported_endpoint",
    )


async def list_models(request: web.Request) -> web.Response:
    """The models that the key may use; of remote ones, those with a reachable upstream."""
    models, may_use = request.app[MODELS], request[API_KEY].may_use
    here = [local_card(name, model) for name, model in models.names() if may_use(model.name)]
    remote = [forwarded_card(model) for model in models.forwarded if model.num_available and may_use(model.model)]
    return _json(ModelList(data=here + remote))


async def get_model(request: web.Request) -> web.Response:
    name, models = request.match_info["name"], request.app[MODELS]
    forwarded = models.find_forwarded(name)
    request[API_KEY].check_model(models.resolve(name) if forwarded is None else forwarded.model)
    return _json(local_card(name, models.find(name)) if forwarded is None else forwarded_card(forwarded))


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
    body, content_type = metrics.render((metrics.ResponseStoreCollector(app[STORE]), *collectors))
    if which is not None:
        if not may_see_names:
            raise Forbidden("metrics of upstreams need an operator's key (admin = true)", param="upstream")
        body = await app[ADD_METRICS](body, which)
    return web.Response(body=body, headers={"Content-Type": content_type})


_POSTS: dict[str, Handler] = {
    **{dialect.path: partial(generate, dialect) for dialect in DIALECTS},
    "/v1/responses": create_response,  # in place of `generate`, which knows no stored ones
    "/v1/responses/input_tokens": count_input_tokens,
    "/v1/responses/{response_id}/cancel": cancel_response,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
_GETS = {
    "/v1/models": list_models,
    "/v1/responses/{response_id}": get_response,
    "/v1/responses/{response_id}/input_items": list_input_items,
    "/tokenizer_info": tokenizer_info,
    "/version": version,
}
_DELETES = {"/v1/responses/{response_id}": delete_response}
_PROBES = {"/health": health, "/ready": ready, "/metrics": get_metrics}
PATHS = (*_POSTS, *_GETS)
NOT_BUILT = (
    *(
        "/v1/embeddings",
        "/v1/responses/compact",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/rerank",
        "/v1/score",
    ),
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
    *(web.delete(spellings(path), handler) for path, handler in _DELETES.items()),
    *(web.get(spellings(path), handler) for path, handler in (*_GETS.items(), *_PROBES.items())),
    *(web.route("*", spellings(path, end="(?:/.*)?"), not_built, expect_handler=leave_body) for path in NOT_BUILT),
]
OPEN_PATHS = frozenset({"/health", "/health/", "/ready", "/ready/"})
METRICS_PATHS = frozenset({"/metrics", "/metrics/"})


def _json(answer: msgspec.Struct) -> web.Response:
    return web.Response(body=encode_json(answer), content_type="application/json")

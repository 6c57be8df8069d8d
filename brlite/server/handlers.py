"""One coroutine for each endpoint, and `ROUTES`, which lists them. Start reading at `generate.py`.

This file interprets no fields and frames no bytes: `dialects/` decodes and encodes, `generate.py` sends.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

import brlite
from brlite.dialects import DIALECTS, openai_chat, openai_completions
from brlite.dialects.embeddings import EMBEDDINGS, POOLING
from brlite.dialects.openai_answer import encode_json
from brlite.dialects.scores import RERANK, SCORE
from brlite.errors import NotFound, NotReady, OperatorKeyRequired
from brlite.http.body import leave_body
from brlite.http.keys import API_KEY, KEYS, shown_api_key
from brlite.server import metrics
from brlite.server.docs_page import docs_page
from brlite.server.embeddings import embed
from brlite.server.explain import explain
from brlite.server.generate import CONFIG, MODELS, RUNNING, generate, json_response, loaded
from brlite.server.model_actions import load_model, unload_model
from brlite.server.model_list import (
    ModelList,
    forwarded_card,
    forwarded_progress,
    local_card,
    local_progress,
    model_props,
    model_slots,
)
from brlite.server.response_store import STORE
from brlite.server.responses import (
    cancel_response,
    count_input_tokens,
    create_response,
    delete_response,
    get_response,
    list_input_items,
)
from brlite.server.scores import score
from brlite.server.tokens import apply_template, count_message_tokens, detokenize, render, tokenize, tokenizer_info

# Appends the metrics of one upstream, by its name, or of `all` to our own metrics text.
ADD_METRICS: web.AppKey[Callable[[bytes, str], Awaitable[bytes]]] = web.AppKey("add_metrics")


async def root(request: web.Request) -> web.Response:
    """Agents send `HEAD /` without a key to check that a server listens. There is no page."""
    if request.method != hdrs.METH_HEAD:
        raise NotFound(f"unknown endpoint: {request.method} /; GET /docs lists those that there are")
    return web.Response()


async def not_built(request: web.Request) -> web.Response:
    """An endpoint that brlite does not have: 404, since gateways count a 5xx as a failure of the server."""
    raise NotFound(
        f"unknown endpoint: {request.path[:200]} is not in this version of brlite; GET /docs lists what is",
        code="unsupported_endpoint",
    )


async def list_models(request: web.Request) -> web.Response:
    """The models that the key may use. Remote models only if an upstream is reachable."""
    models, may_use = request.app[MODELS], request[API_KEY].may_use
    here = [local_card(name, model) for name, model in models.names() if may_use(model.name)]
    remote = [forwarded_card(model) for model in models.forwarded if model.num_available and may_use(model.model)]
    return json_response(ModelList(data=here + remote))


async def get_model(request: web.Request) -> web.Response:
    name, models, key = request.match_info["name"].rstrip("/"), request.app[MODELS], request[API_KEY]
    if (forwarded := models.find_forwarded(name)) is not None:
        key.check_model(forwarded.model, name)
        return json_response(forwarded_card(forwarded))
    model = models.get(name)
    key.check_model(name if model is None else model.name, name)
    if model is None:
        raise models.unknown(name, key.may_use)
    return json_response(local_card(name, model))


async def get_openapi(request: web.Request) -> web.Response:
    text, _ = await asyncio.to_thread(_documentation)
    return web.Response(text=text, content_type="application/json")


async def get_docs(request: web.Request) -> web.Response:
    _, page = await asyncio.to_thread(_documentation)
    return web.Response(text=page, content_type="text/html", headers=DOCS_HEADERS)


async def abort_request(request: web.Request) -> web.Response:
    """End a running request of the same key, by the id of its response or its `X-Request-Id`."""
    name, tenant = request.match_info["request_id"], request[API_KEY].tenant
    found = [delivery for delivery in request.app[RUNNING] if delivery.is_named(name, tenant)]
    if not found:
        raise NotFound(f"no request {name[:64]!r} is running", param="request_id", code="request_not_found")
    for delivery in found:
        delivery.abort()
    return web.json_response({"id": name, "object": "request", "aborted": True})


async def version(request: web.Request) -> web.Response:
    return web.json_response({"version": brlite.__version__})


async def health(request: web.Request) -> web.Response:
    """Liveness: 200, unless an engine's loop has failed. Then only a restart helps."""
    is_alive = all(model.is_alive for model in request.app[MODELS])
    return web.json_response({"status": "alive" if is_alive else "failed"}, status=200 if is_alive else 500)


async def ping(request: web.Request) -> web.Response:
    """SageMaker's probe, by GET or POST: 200 with an empty body if `/health` is 200."""
    return web.Response(status=(await health(request)).status)


async def props(request: web.Request) -> web.Response:
    """llama.cpp's properties of a model. The query parameter `model` is required if several models are served."""
    async with loaded(request, request.query.get("model")) as (model, engine):
        return json_response(model_props(model, engine))


async def slots(request: web.Request) -> web.Response:
    """llama.cpp's list of running sequences, for a loaded model. If keys have names, an operator's key is required.

    It does not count as a request for the model: no limit applies, and it loads nothing.
    """
    models, key, name = request.app[MODELS], request[API_KEY], request.query.get("model")
    if not request.app[CONFIG].server.slots:
        raise NotFound("/slots is switched off on this server (server.slots)", code="unsupported_endpoint")
    if not request.app[KEYS].may_see_all(key):
        raise OperatorKeyRequired("/slots shows the requests of all keys: it needs an operator's key (admin = true)")
    model = models.find(name)
    if model.engine is None:
        raise model.loading.not_ready("is not loaded")
    shown = model_slots(model.engine)
    if request.query.get("fail_on_no_slot") == "1" and all(slot.is_processing for slot in shown):
        raise NotReady(f"no slot is free: the model {model.name} computes {len(shown)} requests", code="no_free_slot")
    return json_response(shown)


async def load(request: web.Request) -> web.Response:
    """vLLM's endpoint: the number of requests in progress on all models, waiting ones included."""
    return web.json_response({"server_load": sum(model.num_requests for model in request.app[MODELS])})


async def ready(request: web.Request) -> web.Response:
    """Readiness: 200 if new requests are accepted, else 503.

    With an accepted key, also the state of each model that the key may use, and the number of its upstreams. A draft
    model that has failed is named there; its model is ready all the same.
    """
    models, key = request.app[MODELS], shown_api_key(request)
    is_ready = models.takes_requests
    answer: dict[str, object] = {"status": models.status}
    if key is not None:
        answer["models"] = [local_progress(model) for model in models if key.may_use(model.name)]
        forwarded = [model for model in models.forwarded if model.name == model.model and key.may_use(model.model)]
        if forwarded:
            answer["forwarded"] = [forwarded_progress(model) for model in forwarded]
    return web.json_response(answer, status=200 if is_ready else 503, headers={} if is_ready else {"Retry-After": "1"})


async def get_metrics(request: web.Request) -> web.Response:
    """Our own metrics and, with `?upstream=NAME` or `all`, those of upstreams.

    If keys have names, all but the process's metrics need an operator's key: they show names of models and keys.
    """
    app, which, keys = request.app, request.query.get("upstream"), request.app[KEYS]
    may_see_names = keys.may_see_all(shown_api_key(request))
    collectors = metrics.named_collectors(app[MODELS], keys, app[metrics.COLLECTORS]) if may_see_names else ()
    body, content_type = metrics.render((metrics.ResponseStoreCollector(app[STORE]), *collectors))
    if which is not None:
        if not may_see_names:
            raise OperatorKeyRequired("metrics of upstreams need an operator's key (admin = true)", param="upstream")
        body = await app[ADD_METRICS](body, which)
    return web.Response(body=body, headers={"Content-Type": content_type})


_POSTS: dict[str, Handler] = {
    **{dialect.path: partial(generate, dialect) for dialect in DIALECTS},
    "/v1/responses": create_response,  # which reads and writes stored responses, then calls `generate`
    "/v1/responses/input_tokens": count_input_tokens,
    "/v1/responses/{response_id}/cancel": cancel_response,
    "/v1/chat/completions/render": partial(render, openai_chat.DIALECT),
    "/v1/completions/render": partial(render, openai_completions.DIALECT),
    **{dialect.path: partial(embed, dialect) for dialect in (EMBEDDINGS, POOLING)},
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/v1/reranking"), partial(score, RERANK)),
    "/v1/score": partial(score, SCORE),
    "/apply-template": apply_template,
    "/v1/messages/count_tokens": count_message_tokens,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/explain": explain,
    "/models/load": load_model,
    "/models/unload": unload_model,
    "/ping": ping,
}
_GETS = {
    "/v1/models": list_models,
    "/v1/responses/{response_id}": get_response,
    "/v1/responses/{response_id}/input_items": list_input_items,
    "/tokenizer_info": tokenizer_info,
    "/props": props,
    "/slots": slots,
    "/load": load,
    "/openapi.json": get_openapi,
    "/docs": get_docs,
    "/version": version,
}
_DELETES = {"/v1/responses/{response_id}": delete_response, "/v1/requests/{request_id}": abort_request}
_PROBES = {"/health": health, "/ready": ready, "/ping": ping, "/metrics": get_metrics}
DOCS_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
# Endpoints of other servers that are not here, and all paths below them.
_OF_OPENAI = (
    "moderations images audio videos files uploads batches fine_tuning vector_stores assistants threads conversations "
    "realtime live responses/compact evals containers chatkit agents vaults decisions content_provenance_checks "
    "organization projects safety webhook_endpoints webhook_event_types chat/completions/{completion_id}"
)
_OF_ANTHROPIC = (
    "messages/batches skills complete agents sessions environments vaults memory_stores deployments deployment_runs "
    "dreams tunnels user_profiles organizations compliance"
)
NOT_BUILT = (
    *dict.fromkeys(f"/v1/{path}" for path in f"{_OF_OPENAI} {_OF_ANTHROPIC}".split()),
    *("/v1/classify", "/embedding"),
    *("/completion", "/generate", "/api/chat", "/api/generate", "/api/tags", "/api/embed"),
)
# Each slash fits one place of a pattern only, and a run of them is bounded. A path that fits in many ways would take
# exponential time, before any key is checked.
_ANY_V1 = "/{v1:/{0,9}(?:v1/{1,9})*}"


def spellings(path: str, end: str = "/*") -> str:
    """A route pattern for the spellings of a path: doubled and trailing slashes, with and without `/v1`."""
    first, *others = path.removeprefix("/v1").strip("/").split("/")
    inner = "".join(f"{{s{index}:/+}}{part}" for index, part in enumerate(others))
    return f"{_ANY_V1}{first}{inner}{{end:{end}}}"


def spellings_below(paths: Iterable[str]) -> str:
    """One pattern for the spellings of all these paths and of what is below them: a route for each would be 50 more."""
    inner = (path.removeprefix("/v1").strip("/").replace("/", "/+") for path in paths)
    names = "|".join(re.sub(r"{\w+}", "[^/]+", path) for path in inner)
    return f"{_ANY_V1}{{path:(?:{names})(?:/.*)?}}"


ROUTES = [
    web.route("*", "/", root),
    *(web.post(path, handler, expect_handler=leave_body) for path, handler in _POSTS.items()),
    web.get("/v1/models/{name:[^/].*}", get_model),
    *(web.get(path, handler) for path, handler in _GETS.items()),
    *(web.get(path, handler) for path, handler in _PROBES.items()),
    *(web.get(f"{path}/", handler) for path, handler in _PROBES.items()),
    # Patterns come after the usual spellings, which aiohttp looks up by their text.
    web.get(spellings("/v1/models", end="/+") + "{name:[^/].*}", get_model),
    *(web.post(spellings(path), handler, expect_handler=leave_body) for path, handler in _POSTS.items()),
    *(web.delete(spellings(path), handler) for path, handler in _DELETES.items()),
    *(web.get(spellings(path), handler) for path, handler in (*_GETS.items(), *_PROBES.items())),
    web.route("*", spellings_below(NOT_BUILT), not_built, expect_handler=leave_body),
]
# The probes need no key and are answered even at the connection limit. The documentation needs no key, since browsers
# send none. Neither the documentation nor `HEAD /` shows this server's models.
PROBES = frozenset({"/health", "/health/", "/ready", "/ready/", "/ping", "/ping/"})
OPEN_PATHS = PROBES | {"/", "/openapi.json", "/docs"}
METRICS_PATHS = frozenset({"/metrics", "/metrics/"})


@functools.cache
def _documentation() -> tuple[str, str]:
    """The OpenAPI document of all endpoints, and its HTML page. The first call makes both, in 0.2 s."""
    from brlite.server.openapi import document

    gets = (*_GETS, "/v1/models/{name}", *_PROBES)
    paths = {"post": tuple(_POSTS), "get": gets, "delete": tuple(_DELETES)}
    made = document([(method, path) for method, each in paths.items() for path in each])
    return encode_json(made).decode(), docs_page(made)

"""The endpoint of each dialect, and what every request to a model goes through: its key, its model, its limits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import msgspec
from aiohttp import web
from msgspec import Struct

from brlite.config.options import Config
from brlite.dialects.dialect import Dialect
from brlite.dialects.generation import MAX_TIMEOUT_SECONDS, Generation, refuse_warnings
from brlite.dialects.openai import encode_json
from brlite.errors import InvalidRequest, stopping
from brlite.http.body import keep_body, read_body
from brlite.http.keys import API_KEY
from brlite.server import idempotency
from brlite.server.delivery import StreamDelivery, WholeDelivery
from brlite.server.served_model import ModelTable, ServedModel

TIMEOUT_HEADER = "X-Request-Timeout"
CONFIG = web.AppKey("config", Config)
MODELS = web.AppKey("models", ModelTable)


async def generate(dialect: Dialect, request: web.Request, *, is_first: bool = False) -> web.StreamResponse:
    """Decode, admit, deliver: the endpoint of each dialect.

    `is_first`: of the requests with its `Idempotency-Key` it is the one to be computed.
    """
    limits = request.app[CONFIG].limits
    body = await read_body(request, limits)
    if idempotency.HEADER in request.headers and not is_first and limits.max_idempotent_bytes:
        keep_body(request, body)
        compute, tenant = partial(generate, is_first=True), request[API_KEY].tenant
        return await request.app[idempotency.ANSWERS].answer(dialect, request, body, tenant, compute)
    call = dialect.decode(body, limits)
    if request.app[CONFIG].server.strict:
        call = msgspec.structs.replace(call, is_strict=True)
    if call.is_strict and call.warnings:
        refuse_warnings(call.warnings)
    make_delivery = StreamDelivery if call.is_streamed else WholeDelivery
    with admit(request, call.model) as model:
        delivery = make_delivery(request, dialect, call, call.model or model.name, limits)
        if call.timeout_seconds is not None or TIMEOUT_HEADER in request.headers:
            delivery.end_after(timeout_seconds(request, call))
        return await delivery.run(model)


def json_response(answer: Struct | Sequence[Struct]) -> web.Response:
    """An answer that is not streamed."""
    return web.Response(body=encode_json(answer), content_type="application/json")


def timeout_seconds(request: web.Request, call: Generation) -> float:
    """How long a request may take that says so, in its body or in the header. Raises `InvalidRequest`."""
    if call.timeout_seconds is not None:
        return call.timeout_seconds
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


@contextmanager
def admit(request: web.Request, name: str | None) -> Iterator[ServedModel]:
    """Hold a place under the request's key, and the model, which is not unloaded inside.

    Raises `Forbidden` or `RateLimited` for the key, `ModelNotFound`, and `NotReady` or `QueueFull` for a model that
    does not take work. The key is checked first, so that a client without access cannot find out model names.
    """
    models, key = request.app[MODELS], request[API_KEY]
    model = models.get(name)
    key.begin(time.monotonic(), (name or "") if model is None else model.name)
    try:
        if model is None:
            raise models.unknown(name)
        if models.is_draining:
            raise stopping()
        with model.in_use(request.app[CONFIG].limits.max_waiting, key.tenant):
            yield model
    finally:
        key.end()

"""The endpoints of embeddings."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from aiohttp import web
from msgspec import UNSET

from brlite.dialects.embeddings import (
    Embedding,
    EmbeddingDialect,
    EmbeddingUsage,
    decode,
    encode_answer,
    encode_item,
)
from brlite.dialects.generation import Text
from brlite.dialects.openai_answer import PromptTokensDetails
from brlite.dialects.scores import Scoring
from brlite.engine.admission import check_pooling
from brlite.engine.async_engine import EngineLoop
from brlite.engine.request import Origin
from brlite.errors import RequestError
from brlite.http.access_log import log_extras
from brlite.http.body import read_body
from brlite.http.keys import API_KEY, spend_tokens
from brlite.server.generate import CONFIG, TIMEOUT_HEADER, admit, timed_out, timeout_seconds
from brlite.server.truncation import Truncator

QUICK_ITEMS = 4  # encoded between two yields to the event loop


async def embed(dialect: EmbeddingDialect, request: web.Request) -> web.Response:
    """Embed each input. If the client disconnects, the handler is cancelled and all requests are aborted."""
    limits = request.app[CONFIG].limits
    call = decode(await read_body(request, limits), limits)
    return await in_time(request, call.timeout_seconds, partial(_embed, dialect, request, call))


async def in_time(
    request: web.Request, in_body: float | None, work: Callable[[], Coroutine[Any, Any, web.Response]]
) -> web.Response:
    """The result of `work()`, which is cancelled at the time limit in the request's body or header, if there is one.

    Raises `RequestTimeout`, or `InvalidRequest` for a wrong limit.
    """
    if in_body is None and TIMEOUT_HEADER not in request.headers:
        return await work()
    seconds = timeout_seconds(request, in_body)
    try:
        return await asyncio.wait_for(work(), seconds)
    except asyncio.TimeoutError:
        raise timed_out(seconds) from None


async def _embed(dialect: EmbeddingDialect, request: web.Request, call: Embedding) -> web.Response:
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    answer_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
    with admit(request, call.model) as model:
        name = call.model or model.name
        engine = await model.loaded(limits.max_wait_seconds, tenant)
        check_pooling(call.params, engine.info)
        prompts, warnings = await encode_inputs(call, engine, tenant)
        num_tokens = sum(map(len, prompts))
        origin, raised = origin_of(request, call)
        with charge(request, name, num_tokens):
            outputs = await engine.embed(prompts, call.params, origin=origin, request_id=answer_id, names=call.names)
    items = []
    for index, output in enumerate(outputs):
        assert output.embedding is not None
        if index % QUICK_ITEMS == QUICK_ITEMS - 1:
            await asyncio.sleep(0)  # a list of 4096 numbers takes 0.3 ms
        items.append(encode_item(dialect, index, output.embedding, is_base64=call.is_base64))
    num_cached = sum(output.num_cached_tokens for output in outputs)
    body = encode_answer(
        dialect,
        items,
        EmbeddingUsage(num_tokens, num_tokens, PromptTokensDetails(num_cached)),
        id=answer_id,
        model=name,
        warnings=[*call.warnings, *warnings, *raised] or UNSET,
    )
    return web.Response(body=body, content_type="application/json")


def origin_of(request: web.Request, call: Embedding | Scoring) -> tuple[Origin, tuple[str, ...]]:
    """The origin of a call's prompts, and a warning if its key does not allow the priority that it asks for."""
    key = request[API_KEY]
    priority, raised = key.allowed_priority(call.priority)
    return Origin(key.tenant, key.weight, priority, call.cache_salt), raised


@contextmanager
def charge(request: web.Request, name: str, num_tokens: int) -> Iterator[None]:
    """Charge the request's key for the prompts that the block computes with the model `name`, and log their tokens.

    A block that raises `RequestError`, such as a refusal, costs nothing. A request cancelled by its client, or at its
    timeout, is charged.
    """
    try:
        yield
    except RequestError:
        num_tokens = 0
        raise
    finally:
        spend_tokens(request, num_tokens, 0)
        log_extras(request).update(model=name, prompt_tokens=num_tokens, completion_tokens=0)


async def encode_inputs(call: Embedding, engine: EngineLoop, tenant: str) -> tuple[list[list[int]], list[str]]:
    """The tokens of each input, and a warning for each truncated one. Raises `InvalidRequest` with the input's name."""
    prompts: list[list[int]] = []
    truncator = Truncator(call.truncation, engine)
    for item, name in zip(call.inputs, call.names, strict=True):
        if isinstance(item, Text):
            await asyncio.sleep(0)  # short texts are encoded on the event loop: let other tasks run between two
            token_ids = await engine.prompts.encode(
                item.text,
                add_special_tokens=item.add_special_tokens,
                param=name,
                room=truncator.room,
                tenant=tenant,
            )
        else:
            token_ids = item.token_ids
        prompts.append(truncator.truncate(token_ids, f"{name} of {len(token_ids)} tokens"))
    return prompts, truncator.warnings

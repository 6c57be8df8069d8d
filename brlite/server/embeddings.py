"""The endpoints of embeddings."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
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
from brlite.engine.admission import check_pooling, context_length
from brlite.engine.async_engine import EngineLoop
from brlite.engine.outputs import RequestOutput
from brlite.errors import RequestError
from brlite.http.access_log import log_extras
from brlite.http.body import read_body
from brlite.http.keys import API_KEY, spend_tokens
from brlite.server.generate import CONFIG, admit

QUICK_ITEMS = 4  # encoded between two yields to the event loop
MAX_REPORTED_CUTS = 16  # proxies search only the end of a long answer for the usage; warnings stand there too


async def embed(dialect: EmbeddingDialect, request: web.Request) -> web.Response:
    """Embed each input. If the client disconnects, the handler is cancelled and all requests are aborted."""
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    call = decode(await read_body(request, limits), limits)
    answer_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
    with admit(request, call.model) as model:
        name = call.model or model.name
        engine = await model.loaded(limits.max_wait_seconds, tenant)
        check_pooling(call.params, engine.info)
        prompts, warnings = await encode_inputs(call, engine, tenant)
        num_tokens = sum(map(len, prompts))
        priority, raised = request[API_KEY].allowed_priority(call.priority)
        with charge(request, name, num_tokens):
            outputs = await engine.embed(
                prompts,
                call.params,
                request_id=answer_id,
                cache_salt=call.cache_salt,
                tenant=tenant,
                weight=request[API_KEY].weight,
                priority=priority,
                names=call.names,
            )
    num_cached = sum(output.num_cached_tokens for output in outputs)
    body = encode_answer(
        dialect,
        await _items(dialect, call, outputs),
        EmbeddingUsage(num_tokens, num_tokens, PromptTokensDetails(num_cached)),
        id=answer_id,
        model=name,
        warnings=[*call.warnings, *warnings, *raised] or UNSET,
    )
    return web.Response(body=body, content_type="application/json")


@contextmanager
def charge(request: web.Request, name: str, num_tokens: int) -> Iterator[None]:
    """Charge the request's key for the prompts that the block computes with the model `name`, and log their tokens.

    A block that raises `RequestError`, such as a refusal, costs nothing. A request cancelled by its client is charged.
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
    warnings: list[str] = []
    num_cut = 0
    for item, name in zip(call.inputs, call.names, strict=True):
        if isinstance(item, Text):
            await asyncio.sleep(0)  # short texts are encoded on the event loop: let other tasks run between two
            token_ids = await engine.encode(
                item.text,
                add_special_tokens=item.add_special_tokens,
                param=name,
                is_bounded=call.truncation is None,
                num_further=0,
                tenant=tenant,
            )
        else:
            token_ids = item.token_ids
        if call.truncation is not None:
            num_kept = call.truncation.num_tokens or context_length(engine.info)
            if len(token_ids) > num_kept:
                num_cut += 1
                if num_cut <= MAX_REPORTED_CUTS:
                    reason = f"was cut to {num_kept} by truncate_prompt_tokens"
                    warnings.append(f"{name} of {len(token_ids)} tokens {reason}")
                token_ids = cut_tokens(token_ids, num_kept, engine, keeps_start=call.truncation.keeps_start)
        prompts.append(token_ids)
    if num_cut > MAX_REPORTED_CUTS:
        warnings.append(f"and {num_cut - MAX_REPORTED_CUTS} more were cut")
    return prompts, warnings


def cut_tokens(token_ids: list[int], num_kept: int, engine: EngineLoop, *, keeps_start: bool) -> list[int]:
    """Keep `num_kept` tokens: from the start, or from the end. A special token at the other end is kept as one of them.

    With `keeps_start` that is the last token, which is the one that is pooled.
    """
    special = engine.tokenizer.special_token_ids
    if keeps_start and num_kept > 1 and token_ids[-1] in special:
        return [*token_ids[: num_kept - 1], token_ids[-1]]
    if not keeps_start and num_kept > 1 and token_ids[0] in special:
        return [token_ids[0], *token_ids[1 - num_kept :]]
    return token_ids[:num_kept] if keeps_start else token_ids[-num_kept:]


async def _items(dialect: EmbeddingDialect, call: Embedding, outputs: list[RequestOutput]) -> list[msgspec.Raw]:
    items = []
    for index, output in enumerate(outputs):
        assert output.embedding is not None
        if index % QUICK_ITEMS == QUICK_ITEMS - 1:
            await asyncio.sleep(0)  # a list of 4096 numbers takes 0.3 ms
        items.append(encode_item(dialect, index, output.embedding, is_base64=call.is_base64))
    return items

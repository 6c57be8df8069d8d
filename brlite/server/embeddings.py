"""The endpoints of embeddings."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web
from msgspec import UNSET

from brlite.dialects.embeddings import Embedding, EmbeddingDialect, PromptCall, decode, encode_answer, encode_item
from brlite.dialects.generation import Text, refuse_warnings
from brlite.dialects.openai_answer import PromptTokensDetails, PromptUsage
from brlite.engine.admission import check_pooling
from brlite.engine.async_engine import EngineLoop
from brlite.engine.request import Origin
from brlite.errors import BrliteError, InvalidRequest, RequestError
from brlite.http.access_log import log_extras
from brlite.http.keys import API_KEY, spend_tokens
from brlite.http.request_id import shown_request_id
from brlite.server.generate import CONFIG, RUNNING, TIMEOUT_HEADER, admit, read_call, timed_out, timeout_seconds
from brlite.server.truncation import Truncator

QUICK_ITEMS = 4  # encoded between two yields to the event loop


async def embed(dialect: EmbeddingDialect, request: web.Request) -> web.Response:
    """Embed each input. If the client disconnects, the handler is cancelled and all requests are aborted."""
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    call = await read_call(request, decode)
    answer_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
    with admit(request, call.model) as model, in_progress(request, call.timeout_seconds, answer_id):
        name = call.model or model.name
        origin, warnings = origin_of(request, call)
        engine = await model.loaded(limits.max_wait_seconds, tenant)
        check_pooling(call.params, engine.info)
        prompts, truncations = await encode_inputs(call, engine, tenant)
        num_tokens = sum(map(len, prompts))
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
        PromptUsage(num_tokens, num_tokens, PromptTokensDetails(num_cached)),
        id=answer_id,
        model=name,
        warnings=[*warnings, *truncations] or UNSET,
    )
    return web.Response(body=body, content_type="application/json")


class PromptWork:
    """A request that generates no text, while it is in progress. What ends it cancels its task."""

    def __init__(self, request: web.Request, answer_id: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._request, self._id, self._task = request, answer_id, task
        self.error: BrliteError | None = None

    def is_named(self, name: str, tenant: str) -> bool:
        return tenant == self._request[API_KEY].tenant and name in (self._id, shown_request_id(self._request))

    def abort(self) -> None:
        self.fail(InvalidRequest("the request was ended by DELETE /v1/requests", code="request_aborted"))

    def fail(self, error: BrliteError) -> None:
        self.error = self.error or error
        self._task.cancel()


@contextmanager
def in_progress(request: web.Request, in_body: float | None, answer_id: str) -> Iterator[None]:
    """The block ends at the time limit in the request's body (`in_body`) or header, at an abort, and with the server.

    Raises `RequestTimeout`, `InvalidRequest` or `NotReady` then.
    """
    work, running, deadline = PromptWork(request, answer_id), request.app[RUNNING], None
    if in_body is not None or TIMEOUT_HEADER in request.headers:
        seconds = timeout_seconds(request, in_body)
        deadline = asyncio.get_running_loop().call_later(seconds, work.fail, timed_out(seconds))
    running.add(work)
    try:
        yield
    except asyncio.CancelledError:
        if work.error is None:
            raise
        raise work.error from None
    finally:
        running.discard(work)
        if deadline is not None:
            deadline.cancel()


def origin_of(request: web.Request, call: PromptCall) -> tuple[Origin, list[str]]:
    """The origin of a call's prompts, and its warnings. Raises `InvalidRequest` for a warning of a strict call."""
    key = request[API_KEY]
    priority, raised = key.allowed_priority(call.priority)
    if call.is_strict:
        refuse_warnings(raised)
    return Origin(key.tenant, key.weight, priority, call.cache_salt), [*call.warnings, *raised]


@contextmanager
def charge(request: web.Request, name: str, num_tokens: int) -> Iterator[None]:
    """Charge the request's key for the prompts that the block computes with the model `name`, and log their tokens.

    A block that raises `RequestError`, such as a refusal, costs nothing. A cancelled request is charged.
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

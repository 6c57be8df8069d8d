"""The frame of the endpoints that compute prompts and generate no text: embeddings and scores."""

from __future__ import annotations

import asyncio
import uuid
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from msgspec import UNSET

from brlite.dialects.embeddings import PromptCall
from brlite.dialects.openai_answer import PromptTokensDetails, PromptUsage
from brlite.engine.async_engine import EngineLoop
from brlite.engine.outputs import RequestOutput
from brlite.engine.request import Origin
from brlite.errors import InvalidRequest, RequestError
from brlite.http.access_log import log_extras
from brlite.http.keys import API_KEY, spend_tokens
from brlite.sampling_params import PoolingParams
from brlite.server.generate import RunningCall, admit

QUICK_ITEMS = 4  # used between two yields to the event loop: an item of 4096 numbers takes 0.2 to 0.3 ms


@dataclass(eq=False)
class PromptWork(RunningCall):
    """A call whose prompts are computed. Cancelling its task, as a client that disconnects does, aborts them all."""

    engine: EngineLoop = field(init=False)  # after `load`
    truncations: Sequence[str] = field(default=(), init=False)  # warnings, beside those of the call

    def abort(self) -> None:
        self.fail(InvalidRequest("the request was ended by DELETE /v1/requests", code="request_aborted"))

    @property
    def origin(self) -> Origin:
        key, call = self.request[API_KEY], self.call
        priority = key.priority if call.priority is None else call.priority
        return Origin(key.tenant, key.weight, priority, call.cache_salt)

    async def load(self) -> None:
        self.engine = await self.loaded()

    async def encode(
        self, text: str, *, name: str = "prompt", room: int | None = 0, adds_special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a text. `room` is as in `PromptEncoder`. Raises `InvalidRequest` with the text's `name`."""
        await asyncio.sleep(0)  # short texts are encoded on the event loop: let other tasks run between two
        return await self.engine.prompts.encode(
            text, add_special_tokens=adds_special_tokens, param=name, room=room, tenant=self.request[API_KEY].tenant
        )

    async def compute(
        self, prompts: Sequence[list[int]], params: PoolingParams, names: Sequence[str]
    ) -> list[RequestOutput]:
        """Embed the prompts, charge them to the request's key, and log their number. `names` names them in errors.

        What raises `RequestError`, such as a refusal, costs nothing. A cancelled request is charged.
        """
        num_tokens = sum(map(len, prompts))
        try:
            return await self.engine.embed(prompts, params, origin=self.origin, request_id=self.id, names=names)
        except RequestError:
            num_tokens = 0
            raise
        finally:
            spend_tokens(self.request, num_tokens, 0)
            log_extras(self.request).update(model=self.model_name, prompt_tokens=num_tokens, completion_tokens=0)

    def response(self, encode: Callable[..., bytes], outputs: Sequence[RequestOutput]) -> web.Response:
        """The response. `encode` makes its body of the usage, and of `id`, `model` and `warnings`."""
        num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        details = PromptTokensDetails(sum(output.num_cached_tokens for output in outputs))
        usage = PromptUsage(num_tokens, num_tokens, details)
        warnings = (*self.call.warnings, *self.truncations) or UNSET
        body = encode(usage, id=self.id, model=self.model_name, warnings=warnings)
        return web.Response(body=body, content_type="application/json")


@asynccontextmanager
async def prompt_work(request: web.Request, call: PromptCall, id_prefix: str) -> AsyncIterator[PromptWork]:
    """Admit the call and wait for its model, which is kept in the block. The block ends as `in_progress` says."""
    with admit(request, call.model) as model:
        work = PromptWork(request, call, model, f"{id_prefix}{uuid.uuid4().hex}")
        with work.in_progress():
            await work.load()
            yield work


async def embeddings(outputs: Sequence[RequestOutput]) -> AsyncIterator[array[float]]:
    """The embeddings of all prompts. Other tasks run between."""
    for index, output in enumerate(outputs):
        assert output.embedding is not None
        if index % QUICK_ITEMS == QUICK_ITEMS - 1:
            await asyncio.sleep(0)
        yield output.embedding

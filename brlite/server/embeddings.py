"""The endpoints of embeddings."""

from __future__ import annotations

from functools import partial

from aiohttp import web
from msgspec import Raw

from brlite.dialects.embeddings import Embedding, EmbeddingDialect, decode, encode_answer, encode_item
from brlite.dialects.generation import Text
from brlite.engine.admission import check_pooling
from brlite.server.generate import read_call
from brlite.server.prompt_work import PromptWork, embeddings, prompt_work
from brlite.server.truncation import Truncator


async def embed(dialect: EmbeddingDialect, request: web.Request) -> web.Response:
    """Embed each input."""
    call = await read_call(request, decode)
    async with prompt_work(request, call, dialect.id_prefix) as work:
        check_pooling(call.params, work.engine.info)
        truncator = Truncator(call.truncation, work.engine)
        prompts = await encode_inputs(call, work, truncator)
        work.truncations = truncator.warnings
        outputs = await work.compute(prompts, call.params, call.names)
    items = list[Raw]()
    async for embedding in embeddings(outputs):
        items.append(encode_item(dialect, len(items), embedding, is_base64=call.is_base64))
    return work.response(partial(encode_answer, dialect, items), outputs)


async def encode_inputs(call: Embedding, work: PromptWork, truncator: Truncator) -> list[list[int]]:
    """The tokens of each input, truncated. Raises `InvalidRequest` with the input's name."""
    prompts: list[list[int]] = []
    for item, name in zip(call.inputs, call.names, strict=True):
        if isinstance(item, Text):
            adds = item.add_special_tokens
            token_ids = await work.encode(item.text, name=name, room=truncator.room, adds_special_tokens=adds)
        else:
            token_ids = item.token_ids
        prompts.append(truncator.truncate(token_ids, f"{name} of {len(token_ids)} tokens"))
    return prompts

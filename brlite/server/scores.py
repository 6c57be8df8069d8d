"""The endpoints that score pairs of texts: a query with each document, or two texts."""

from __future__ import annotations

import asyncio
import uuid

from aiohttp import web
from msgspec import UNSET

from brlite.dialects.openai_answer import PromptTokensDetails
from brlite.dialects.scores import ScoreDialect, ScoreUsage, Scoring
from brlite.engine.admission import context_length
from brlite.engine.async_engine import EngineLoop
from brlite.engine.outputs import RequestOutput
from brlite.engine.scoring import SCORING, ScoringHead
from brlite.errors import InvalidRequest
from brlite.http.body import read_body
from brlite.http.keys import API_KEY
from brlite.server.embeddings import MAX_REPORTED_CUTS, QUICK_ITEMS, charge, cut_tokens
from brlite.server.generate import CONFIG, admit


async def score(dialect: ScoreDialect, request: web.Request) -> web.Response:
    """Score each pair of texts. If the client disconnects, the handler is cancelled and all requests are aborted."""
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    call = dialect.decode(await read_body(request, limits), limits)
    answer_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
    with admit(request, call.model) as model:
        name = call.model or model.name
        engine = await model.loaded(limits.max_wait_seconds, tenant)
        if engine.scoring_head is None:
            raise InvalidRequest(
                f"the model {model.name} has no scoring head; rerank and score need a model made for that "
                "(…ForSequenceClassification with one label)",
                param="model",
                code="no_scoring_head",
            )
        prompts, warnings = await _encode_pairs(call, engine, tenant)
        num_tokens = sum(map(len, prompts))
        priority, raised = request[API_KEY].allowed_priority(call.priority)
        with charge(request, name, num_tokens):
            outputs = await engine.embed(
                prompts,
                SCORING,
                request_id=answer_id,
                cache_salt=call.cache_salt,
                tenant=tenant,
                weight=request[API_KEY].weight,
                priority=priority,
                names=call.second_names,
            )
    num_cached = sum(output.num_cached_tokens for output in outputs)
    body = dialect.encode(
        call,
        await _scores(engine.scoring_head, outputs, call.use_activation),
        ScoreUsage(num_tokens, num_tokens, PromptTokensDetails(num_cached)),
        id=answer_id,
        model=name,
        warnings=[*call.warnings, *warnings, *raised] or UNSET,
    )
    return web.Response(body=body, content_type="application/json")


async def _encode_pairs(call: Scoring, engine: EngineLoop, tenant: str) -> tuple[list[list[int]], list[str]]:
    """The joined tokens of each pair, and a warning for each truncated pair.

    Both texts have the special tokens that the tokenizer adds. Raises `InvalidRequest` with the text's name.
    """
    firsts = [
        await _encode(text, name, call, engine, tenant)
        for text, name in zip(call.firsts, call.first_names, strict=True)
    ]
    prompts: list[list[int]] = []
    warnings: list[str] = []
    num_cut = 0
    for number, (text, name) in enumerate(zip(call.seconds, call.second_names, strict=True)):
        token_ids = firsts[number if len(firsts) > 1 else 0] + await _encode(text, name, call, engine, tenant)
        if call.truncation is not None:
            num_kept = call.truncation.num_tokens or context_length(engine.info)
            if len(token_ids) > num_kept:
                num_cut += 1
                if num_cut <= MAX_REPORTED_CUTS:
                    warnings.append(f"the pair of {name} was cut to {num_kept} tokens by truncate_prompt_tokens")
                token_ids = cut_tokens(token_ids, num_kept, engine, keeps_start=call.truncation.keeps_start)
        prompts.append(token_ids)
    if num_cut > MAX_REPORTED_CUTS:
        warnings.append(f"and {num_cut - MAX_REPORTED_CUTS} more were cut")
    return prompts, warnings


async def _encode(text: str, name: str, call: Scoring, engine: EngineLoop, tenant: str) -> list[int]:
    """A text's tokens. With truncation at most one token more than a pair may have, so that the pair is still cut."""
    await asyncio.sleep(0)  # short texts are encoded on the event loop: let other tasks run between two
    cut = call.truncation
    token_ids = await engine.encode(text, param=name, is_bounded=cut is None, num_further=0, tenant=tenant)
    if cut is None:
        return token_ids
    most = (cut.num_tokens or context_length(engine.info)) + 1
    return token_ids if len(token_ids) <= most else cut_tokens(token_ids, most, engine, keeps_start=cut.keeps_start)


async def _scores(head: ScoringHead, outputs: list[RequestOutput], use_activation: bool | None) -> list[float]:
    found = []
    for index, output in enumerate(outputs):
        assert output.embedding is not None
        if index % QUICK_ITEMS == QUICK_ITEMS - 1:
            await asyncio.sleep(0)  # a score of 4096 numbers takes 0.2 ms
        found.append(head.score(output.embedding, use_activation=use_activation))
    return found

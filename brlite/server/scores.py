"""The endpoints that score pairs of texts: a query with each document, or two texts."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Iterable

from aiohttp import web
from msgspec import UNSET

from brlite.dialects.openai_answer import PromptTokensDetails, PromptUsage
from brlite.dialects.scores import ScoreDialect, Scoring
from brlite.engine.async_engine import EngineLoop
from brlite.engine.outputs import RequestOutput
from brlite.engine.scoring import SCORING, ScoringHead
from brlite.errors import InvalidRequest
from brlite.http.keys import API_KEY
from brlite.server.embeddings import QUICK_ITEMS, charge, in_progress, origin_of
from brlite.server.generate import CONFIG, admit, read_call
from brlite.server.truncation import Truncator
from brlite.tokenizer.pair_template import PairTemplate


async def score(dialect: ScoreDialect, request: web.Request) -> web.Response:
    """Score each pair of texts. If the client disconnects, the handler is cancelled and all requests are aborted."""
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    call = await read_call(request, dialect.decode)
    answer_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
    with admit(request, call.model) as model, in_progress(request, call.timeout_seconds, answer_id):
        name = call.model or model.name
        origin, warnings = origin_of(request, call)
        engine = await model.loaded(limits.max_wait_seconds, tenant)
        if engine.scoring_head is None:
            raise InvalidRequest(
                f"the model {name} has no scoring head; rerank and score need a model made for that "
                "(…ForSequenceClassification with one label), or this server's setting classifier_from_token",
                param="model",
                code="no_scoring_head",
            )
        engine.scoring_head.check_instruction(call.instruction)
        prompts, truncations = await _encode_pairs(call, engine, tenant, engine.scoring_head.template)
        num_tokens = sum(map(len, prompts))
        with charge(request, name, num_tokens):
            outputs = await engine.embed(prompts, SCORING, origin=origin, request_id=answer_id, names=call.second_names)
    num_cached = sum(output.num_cached_tokens for output in outputs)
    body = dialect.encode(
        call,
        await _scores(engine.scoring_head, outputs, call.use_activation),
        PromptUsage(num_tokens, num_tokens, PromptTokensDetails(num_cached)),
        id=answer_id,
        model=name,
        warnings=[*warnings, *truncations] or UNSET,
    )
    return web.Response(body=body, content_type="application/json")


async def _scores(head: ScoringHead, outputs: list[RequestOutput], use_activation: bool | None) -> list[float]:
    """One score for each output. Other tasks run between."""
    scores = []
    for index, output in enumerate(outputs):
        assert output.embedding is not None
        if index % QUICK_ITEMS == QUICK_ITEMS - 1:
            await asyncio.sleep(0)  # a score of 4096 numbers takes 0.2 ms
        scores.append(head.score(output.embedding, use_activation=use_activation))
    return scores


async def _encode_pairs(
    call: Scoring, engine: EngineLoop, tenant: str, template: PairTemplate | None
) -> tuple[list[list[int]], list[str]]:
    """The tokens of each pair, and a warning for each truncated one. Raises `InvalidRequest` with the text's name.

    Without a template both texts have the special tokens that the tokenizer adds.
    """
    if template is not None:
        return await _encode_with_template(template, call, engine, tenant)
    truncator = Truncator(call.truncation, engine)

    async def encode(text: str, name: str) -> list[int]:
        await asyncio.sleep(0)  # short texts are encoded on the event loop: let other tasks run between two
        token_ids = await engine.prompts.encode(text, param=name, room=truncator.room, tenant=tenant)
        return truncator.shorten(token_ids)

    firsts = [await encode(text, name) for text, name in zip(call.firsts, call.first_names, strict=True)]
    prompts: list[list[int]] = []
    for number, (text, name) in enumerate(zip(call.seconds, call.second_names, strict=True)):
        token_ids = firsts[number if len(firsts) > 1 else 0] + await encode(text, name)
        prompts.append(truncator.truncate(token_ids, f"the pair of {name}"))
    return prompts, truncator.warnings


async def _encode_with_template(
    template: PairTemplate, call: Scoring, engine: EngineLoop, tenant: str
) -> tuple[list[list[int]], list[str]]:
    """As `_encode_pairs`. Only the second text is truncated: the template and the first text must fit."""
    truncator = Truncator(call.truncation, engine)
    tail = await engine.prompts.encode(template.tail(), room=0, tenant=tenant)
    if call.instruction is not None:  # checked alone, so that an error about the query is about the query
        await engine.prompts.encode(template.fill("", "", call.instruction), param="instruction", room=1, tenant=tenant)
    heads = []
    for text, name in zip(call.firsts, call.first_names, strict=True):
        await asyncio.sleep(0)
        heads.append(
            await engine.prompts.encode(template.head(text, call.instruction), param=name, room=0, tenant=tenant)
        )
        if not truncator.is_off and len(heads[-1]) + len(tail) >= truncator.num_kept:
            raise InvalidRequest(
                f"{name} has with the template {len(heads[-1]) + len(tail)} tokens, which leaves no room for a second "
                f"text: truncate_prompt_tokens keeps {truncator.num_kept}",
                param=name,
            )
    prompts: list[list[int]] = []
    for number, (text, name) in enumerate(zip(call.seconds, call.second_names, strict=True)):
        index = number if len(heads) > 1 else 0
        await asyncio.sleep(0)
        prompt = template.fill(call.firsts[index], text, call.instruction)
        token_ids = await engine.prompts.encode(prompt, param=name, room=truncator.room, tenant=tenant)
        num_first = _num_equal(heads[index], token_ids)
        num_last = _num_equal(reversed(tail), reversed(token_ids))
        prompts.append(truncator.truncate_between(token_ids, f"the pair of {name}", num_first, num_last))
    return prompts, truncator.warnings


def _num_equal(first: Iterable[int], second: Iterable[int]) -> int:
    """The number of equal tokens at the beginning of both."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))

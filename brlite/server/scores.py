"""The endpoints that score pairs of texts: a query with each document, or two texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial

from aiohttp import web

from brlite.dialects.scores import ScoreDialect, Scoring
from brlite.engine.scoring import SCORING
from brlite.errors import InvalidRequest
from brlite.server.generate import read_call
from brlite.server.prompt_work import PromptWork, embeddings, prompt_work
from brlite.server.truncation import Truncator
from brlite.tokenizer.pair_template import PairTemplate


async def score(dialect: ScoreDialect, request: web.Request) -> web.Response:
    """Score each pair of texts."""
    call = await read_call(request, dialect.decode)
    async with prompt_work(request, call, dialect.id_prefix) as work:
        head = work.engine.scoring_head
        if head is None:
            raise InvalidRequest(
                f"the model {work.model_name} has no scoring head; rerank and score need a model made for that "
                "(…ForSequenceClassification with one label), or this server's setting classifier_from_token",
                param="model",
                code="no_scoring_head",
            )
        head.check_instruction(call.instruction)
        truncator = Truncator(call.truncation, work.engine)
        if head.template is None:
            prompts = await _encode_pairs(call, work, truncator)
        else:
            prompts = await _fill_template(head.template, call, work, truncator)
        work.truncations = truncator.warnings
        outputs = await work.compute(prompts, SCORING, call.second_names)
    scores = [head.score(each, use_activation=call.use_activation) async for each in embeddings(outputs)]
    return work.response(partial(dialect.encode, call, scores), outputs)


async def _encode_pairs(call: Scoring, work: PromptWork, truncator: Truncator) -> list[list[int]]:
    """The tokens of each pair, truncated. Both texts have the special tokens that the tokenizer adds.

    Raises `InvalidRequest` with the text's name.
    """
    firsts = [
        truncator.shorten(await work.encode(text, name=name, room=truncator.room))
        for text, name in zip(call.firsts, call.first_names, strict=True)
    ]
    prompts: list[list[int]] = []
    for number, (text, name) in enumerate(zip(call.seconds, call.second_names, strict=True)):
        second = truncator.shorten(await work.encode(text, name=name, room=truncator.room))
        token_ids = firsts[number if len(firsts) > 1 else 0] + second
        prompts.append(truncator.truncate(token_ids, f"the pair of {name}"))
    return prompts


async def _fill_template(
    template: PairTemplate, call: Scoring, work: PromptWork, truncator: Truncator
) -> list[list[int]]:
    """As `_encode_pairs`. Only the second text is truncated: the template and the first text must fit."""
    tail = await work.encode(template.tail())
    if call.instruction is not None:  # checked alone, so that an error about the query is about the query
        await work.encode(template.fill("", "", call.instruction), name="instruction", room=1)
    heads: list[list[int]] = []
    for text, name in zip(call.firsts, call.first_names, strict=True):
        heads.append(await work.encode(template.head(text, call.instruction), name=name))
        num_tokens = len(heads[-1]) + len(tail)
        if not truncator.is_off and num_tokens >= truncator.num_kept:
            raise InvalidRequest(
                f"{name} has with the template {num_tokens} tokens, which leaves no room for a second text: "
                f"truncate_prompt_tokens keeps {truncator.num_kept}",
                param=name,
            )
    prompts: list[list[int]] = []
    for number, (text, name) in enumerate(zip(call.seconds, call.second_names, strict=True)):
        index = number if len(heads) > 1 else 0
        prompt = template.fill(call.firsts[index], text, call.instruction)
        token_ids = await work.encode(prompt, name=name, room=truncator.room)
        num_first = _num_equal(heads[index], token_ids)
        num_last = _num_equal(reversed(tail), reversed(token_ids))
        prompts.append(truncator.truncate_between(token_ids, f"the pair of {name}", num_first, num_last))
    return prompts


def _num_equal(first: Iterable[int], second: Iterable[int]) -> int:
    """The number of equal tokens at the beginning of both."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))

"""Scores the relevance of texts to each other: vLLM's score, and rerank.

Rerank has the shape of vLLM, Jina and Cohere, or, with `texts` in place of `documents`, that of Text Embeddings
Inference (TEI).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType

from brlite.config.options import LimitsConfig
from brlite.dialects.embeddings import PromptCall, PromptRequest, prompt_fields
from brlite.dialects.json_body import BodyDecoder, given_twice, missing_field
from brlite.dialects.openai import Whole, truncation
from brlite.dialects.openai_answer import AnswerList, PromptUsage, encode_json
from brlite.errors import InvalidRequest


class TextPart(Struct):
    text: str


class PairRequest(PromptRequest, kw_only=True):
    """The fields that rerank and score have in common."""

    use_activation: bool | None = None
    instruction: str | None = None
    instruct: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class RerankRequest(PairRequest, kw_only=True):
    query: str | TextPart
    documents: list[str | TextPart] | None = None
    top_n: Whole | None = None
    return_documents: bool | None = None
    texts: list[str] | None = None
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None


class ScoreRequest(PairRequest, kw_only=True):
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None


class RerankResult(Struct, kw_only=True):
    index: int
    relevance_score: float
    document: TextPart | UnsetType = UNSET


class RerankAnswer(Struct, kw_only=True):
    id: str
    model: str
    results: list[RerankResult]
    usage: PromptUsage
    warnings: Sequence[str] | UnsetType = UNSET


class TeiRank(Struct, kw_only=True):
    """One of TEI's answer, which is a bare list."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class ScoreItem(Struct, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreAnswer(AnswerList[ScoreItem]):
    pass


class Scoring(PromptCall, frozen=True, kw_only=True):
    """A call: each text of `seconds` is scored with the text of `firsts` at the same index, or with the only one.

    `first_names` and `second_names` name the texts in errors. `top_n` and `returns_documents` are rerank's; with
    `is_tei` the answer has TEI's shape. With `use_activation` a score is the sigmoid of the head's output; None: the
    model's default. So is an `instruction` of None, which says what makes a document relevant.
    """

    firsts: tuple[str, ...]
    seconds: tuple[str, ...]
    first_names: tuple[str, ...]
    second_names: tuple[str, ...]
    use_activation: bool | None
    instruction: str | None
    top_n: int | None = None
    returns_documents: bool = True
    is_tei: bool = False


class ScoreDialect(NamedTuple):
    """One of the two APIs. `encode` makes the answer from a call, its scores, the usage and further keywords."""

    id_prefix: str
    decode: Callable[[bytes, LimitsConfig], Scoring]
    encode: Callable[..., bytes]


# vLLM's names: of the first and the second texts of a pair; of what makes a document relevant (`instruct` is SGLang's).
FIRSTS, SECONDS = ("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")
INSTRUCTIONS = ("instruction", "instruct")
# TEI's fields of a rerank; llama.cpp takes `top_n` with them.
TEI_ONLY = ("texts", "raw_scores", "return_text", "truncate", "truncation_direction")
TEI_FIELDS = ("model", "query", "top_n", *TEI_ONLY)

_RERANK = BodyDecoder(RerankRequest)
_SCORE = BodyDecoder(ScoreRequest)


def _decode_rerank(data: bytes, limits: LimitsConfig) -> Scoring:
    """Decode the body. As with vLLM, a `top_n` of 0 keeps all documents. Raises `InvalidRequest`, naming the field."""
    body, undecoded = _RERANK.decode(data)
    top_n = body.top_n
    if top_n is not None and (top_n != int(top_n) or top_n < 0):
        raise InvalidRequest(f"top_n must be a whole number of at least 0, got {top_n}", param="top_n")
    if body.texts is not None:
        return _decode_tei(body, body.texts, undecoded, limits)
    for name in TEI_ONLY:
        if getattr(body, name) is not None:
            raise InvalidRequest(f"{name} needs texts, not documents", param=name)
    if body.documents is None:
        raise missing_field("documents")
    documents = tuple(map(_text_of, body.documents))
    return Scoring(
        firsts=(_text_of(body.query),),
        seconds=documents,
        first_names=("query",),
        second_names=_names("documents", documents, limits),
        top_n=int(top_n) if top_n else None,
        returns_documents=body.return_documents is not False,
        **_common(body, undecoded),
    )


def _decode_tei(
    body: RerankRequest, texts: Sequence[str], undecoded: Mapping[str, msgspec.Raw], limits: LimitsConfig
) -> Scoring:
    """A request with `texts`. Its answer has no place for warnings, so other fields are refused by their names."""
    others = [name for name in body.__struct_fields__ if name not in TEI_FIELDS and getattr(body, name) is not None]
    if others := [*others, *undecoded]:
        name, fields = others[0][:64], ", ".join(TEI_FIELDS)
        raise InvalidRequest(f"{name} cannot be given with texts; the fields are {fields}", param=name)
    common = _common(body, {}) | {"use_activation": not body.raw_scores}
    if body.truncate:
        common["truncation"] = truncation(-1, (body.truncation_direction or "right").lower())
    return Scoring(
        firsts=(_text_of(body.query),),
        seconds=tuple(texts),
        first_names=("query",),
        second_names=_names("texts", texts, limits),
        top_n=int(body.top_n) if body.top_n else None,
        returns_documents=body.return_text is True,
        is_tei=True,
        **common,
    )


def _decode_score(data: bytes, limits: LimitsConfig) -> Scoring:
    """Decode the body. `text_1` is one text, or has as many as `text_2`. Raises `InvalidRequest`, naming the field."""
    body, undecoded = _SCORE.decode(data)
    first, second = _one_of(body, FIRSTS), _one_of(body, SECONDS)
    texts, names = list[tuple[str, ...]](), list[tuple[str, ...]]()
    for name in (first, second):
        value = getattr(body, name)
        texts.append((value,) if isinstance(value, str) else tuple(value))
        names.append((name,) if isinstance(value, str) else _names(name, texts[-1], limits))
    if len(texts[0]) not in (1, len(texts[1])):
        raise InvalidRequest(
            f"{first} must be one text, or as many as {second} has ({len(texts[1])}), got {len(texts[0])}", param=first
        )
    return Scoring(
        firsts=texts[0],
        seconds=texts[1],
        first_names=names[0],
        second_names=names[1],
        **_common(body, undecoded),
    )


def _encode_rerank(call: Scoring, scores: Sequence[float], usage: PromptUsage, **others: Any) -> bytes:
    """Encode the answer, best first; equal scores keep the request's order. `others` are `id`, `model`, `warnings`."""
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: call.top_n]
    if call.is_tei:  # texts are truncated only if `truncate` says so, which needs no warning
        texts = call.seconds if call.returns_documents else [UNSET] * len(scores)
        return encode_json([TeiRank(index=index, score=scores[index], text=texts[index]) for index in best])
    results = [
        RerankResult(
            index=index,
            relevance_score=scores[index],
            document=TextPart(call.seconds[index]) if call.returns_documents else UNSET,
        )
        for index in best
    ]
    return encode_json(RerankAnswer(results=results, usage=usage, **others))


def _encode_score(call: Scoring, scores: Sequence[float], usage: PromptUsage, **others: Any) -> bytes:
    """Encode the answer, in the request's order. `others` as in `_encode_rerank`."""
    data = [ScoreItem(index=index, score=score) for index, score in enumerate(scores)]
    return encode_json(ScoreAnswer(data=data, usage=usage, created=int(time.time()), **others))


RERANK = ScoreDialect("rerank-", _decode_rerank, _encode_rerank)
SCORE = ScoreDialect("score-", _decode_score, _encode_score)


def _text_of(text: str | TextPart) -> str:
    return text if isinstance(text, str) else text.text


def _names(field: str, texts: Sequence[str], limits: LimitsConfig) -> tuple[str, ...]:
    if not 1 <= len(texts) <= limits.max_embedding_inputs:
        raise InvalidRequest(
            f"{field} must hold at least 1 and at most {limits.max_embedding_inputs} texts on this server "
            f"(limits.max_embedding_inputs), got {len(texts)}",
            param=field,
        )
    return tuple(f"{field}[{number}]" for number in range(len(texts)))


def _one_of(body: ScoreRequest, names: Sequence[str]) -> str:
    """The one name of these fields that the body has. Raises `InvalidRequest` for none or several."""
    given = [name for name in names if getattr(body, name) is not None]
    if not given:
        raise missing_field(names[0])
    if len(given) > 1:
        raise given_twice(given[1], given[0])
    return given[0]


def _common(body: PairRequest, undecoded: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    fields, variables = prompt_fields(body, undecoded), body.chat_template_kwargs or {}
    if variables.keys() - INSTRUCTIONS:
        fields["warnings"] += ("chat_template_kwargs: only instruction has an effect at this endpoint",)
    instruction, given_as = None, ""
    for name, value in (
        *((name, getattr(body, name)) for name in INSTRUCTIONS),
        *((f"chat_template_kwargs.{name}", variables.get(name)) for name in INSTRUCTIONS),
    ):
        if not isinstance(value, str | None):
            raise InvalidRequest(f"{name} must be a string", param=name)
        if value is not None and instruction not in (None, value):
            raise InvalidRequest(f"{name} differs from {given_as}; give one of them", param=name)
        if value is not None:
            instruction, given_as = value, name
    return {**fields, "use_activation": body.use_activation, "instruction": instruction}

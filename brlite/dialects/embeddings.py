"""OpenAI's embeddings and vLLM's pooling. Both have the same request.

OpenAI's clients ask for base64: an embedding is then float32, little-endian, as in OpenAI's API.
"""

from __future__ import annotations

import base64
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct

from brlite.config.options import LimitsConfig
from brlite.dialects.fields import check_undecoded
from brlite.dialects.generation import Priority, Text, Timeout, TokenIds, Truncation
from brlite.dialects.json_body import BodyDecoder
from brlite.dialects.openai import Whole, truncation
from brlite.dialects.openai_answer import AnswerList, PromptUsage, encode_json
from brlite.dialects.openai_completions import read_prompts
from brlite.sampling_params import Pooling, PoolingParams


class PromptRequest(Struct, kw_only=True):
    """The fields that requests without generated text have in common: embeddings, rerank, score."""

    model: str | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    timeout: Timeout | None = None
    strict: bool | None = None


class EmbeddingRequest(PromptRequest, kw_only=True):
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None
    normalize: bool | None = None
    pooling: Pooling | None = None
    add_special_tokens: bool | None = None


class EmbeddingItem(Struct, tag_field="object", tag="embedding"):
    """One embedding, as numbers or in base64."""

    index: int
    embedding: list[float] | str


class EmbeddingAnswer(AnswerList[EmbeddingItem]):
    pass


class PoolingItem(Struct, tag_field="object", tag="pooling"):
    """One embedding in the shape of vLLM's /pooling."""

    index: int
    data: list[float] | str


class PoolingAnswer(AnswerList[PoolingItem]):
    pass


class PromptCall(Struct, frozen=True, kw_only=True):
    """The fields that calls without generated text have in common. `is_strict`: refused if there would be a warning."""

    model: str | None
    truncation: Truncation | None
    cache_salt: str
    priority: int | None
    timeout_seconds: float | None
    is_strict: bool
    warnings: tuple[str, ...]


class Embedding(PromptCall, frozen=True, kw_only=True):
    """A call: texts or tokens, and how to embed them. `names` has the name of each input in errors."""

    inputs: tuple[Text | TokenIds, ...]
    names: tuple[str, ...]
    params: PoolingParams
    is_base64: bool


class EmbeddingDialect(NamedTuple):
    """The shape of the answers of one of the two endpoints."""

    path: str
    id_prefix: str
    item: Callable[[int, list[float] | str], Struct]
    answer: Callable[..., Struct]


EMBEDDINGS = EmbeddingDialect("/v1/embeddings", "embd-", EmbeddingItem, EmbeddingAnswer)
POOLING = EmbeddingDialect("/pooling", "pool-", PoolingItem, PoolingAnswer)

_DECODER = BodyDecoder(EmbeddingRequest)


def decode(data: bytes, limits: LimitsConfig) -> Embedding:
    """Decode the body. Raises `InvalidRequest`, naming the field."""
    body, undecoded = _DECODER.decode(data)
    inputs = read_prompts("input", body.input, limits, "max_embedding_inputs", body.add_special_tokens is not False)
    is_list = isinstance(body.input, list) and not isinstance(body.input[0], int)
    dimensions: Any = body.dimensions  # PoolingParams refuses all but whole numbers
    if isinstance(dimensions, float) and dimensions.is_integer():
        dimensions = int(dimensions)  # JSON may write 6 as 6.0
    return Embedding(
        inputs=inputs,
        names=tuple(f"input[{number}]" for number in range(len(inputs))) if is_list else ("input",),
        params=PoolingParams(pooling=body.pooling, dimensions=dimensions, normalize=body.normalize is not False),
        is_base64=body.encoding_format == "base64",
        **prompt_fields(body, undecoded),
    )


def prompt_fields(body: PromptRequest, undecoded: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    """The fields of a `PromptCall`. `undecoded` are the fields that the body's struct lacks.

    With `truncate_prompt_tokens` a text is cut at its end unless `truncation_side` is set, as the tokenizers of
    embedding models do. Raises `InvalidRequest`.
    """
    cut = body.truncate_prompt_tokens
    return {
        "model": body.model,
        "truncation": None if cut is None else truncation(cut, body.truncation_side or "right"),
        "cache_salt": body.cache_salt or "",
        "priority": body.priority,
        "timeout_seconds": body.timeout,
        "is_strict": bool(body.strict),
        "warnings": check_undecoded(undecoded, body.__struct_fields__, generates=False) if undecoded else (),
    }


def encode_item(dialect: EmbeddingDialect, index: int, embedding: array[float], *, is_base64: bool) -> msgspec.Raw:
    """One item of an answer. Items are encoded separately because a list of numbers takes long to encode."""
    value: list[float] | str = embedding.tolist()
    if is_base64:
        if sys.byteorder == "big":
            embedding = array("f", embedding)
            embedding.byteswap()
        value = base64.b64encode(embedding.tobytes()).decode()
    return msgspec.Raw(encode_json(dialect.item(index, value)))


def encode_answer(dialect: EmbeddingDialect, items: Sequence[msgspec.Raw], usage: PromptUsage, **others: Any) -> bytes:
    """The whole answer. `others` are its `id`, the `model` name that the client sent, and `warnings`."""
    return encode_json(dialect.answer(data=items, usage=usage, created=int(time.time()), **others))

"""OpenAI's embeddings and vLLM's pooling, which have one request.

An embedding's bytes are float32, little-endian in base64 as in OpenAI's API, whose clients ask for that.
"""

from __future__ import annotations

import base64
import sys
import time
from array import array
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType

from brlite.config.options import LimitsConfig
from brlite.dialects.fields import check_undecoded
from brlite.dialects.generation import Priority, Text, TokenIds, Truncation
from brlite.dialects.json_body import BodyDecoder
from brlite.dialects.openai import Whole, truncation
from brlite.dialects.openai_answer import PromptTokensDetails, encode_json
from brlite.dialects.openai_completions import read_prompts
from brlite.sampling_params import Pooling, PoolingParams


class EmbeddingRequest(Struct, kw_only=True):
    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None
    normalize: bool | None = None
    pooling: Pooling | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: str | None = None
    priority: Priority | None = None


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingItem(Struct):
    """One embedding, as numbers or in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: Sequence[EmbeddingItem | msgspec.Raw]
    usage: EmbeddingUsage
    warnings: Sequence[str] | UnsetType = UNSET


class PoolingItem(Struct):
    """The same in vLLM's shape of /pooling."""

    object: Literal["pooling"]
    index: int
    data: list[float] | str


class PoolingAnswer(Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: Sequence[PoolingItem | msgspec.Raw]
    usage: EmbeddingUsage
    warnings: Sequence[str] | UnsetType = UNSET


class Embedding(Struct, frozen=True, kw_only=True):
    """A call: texts or tokens, and how their embeddings are made. `names` are what errors call each input."""

    model: str | None
    inputs: tuple[Text | TokenIds, ...]
    names: tuple[str, ...]
    params: PoolingParams
    is_base64: bool
    truncation: Truncation | None
    cache_salt: str
    priority: int | None
    warnings: tuple[str, ...]


class EmbeddingDialect(NamedTuple):
    """One of the two endpoints: what its answers look like."""

    path: str
    id_prefix: str
    item: type[EmbeddingItem | PoolingItem]
    answer: type[EmbeddingAnswer | PoolingAnswer]


EMBEDDINGS = EmbeddingDialect("/v1/embeddings", "embd-", EmbeddingItem, EmbeddingAnswer)
POOLING = EmbeddingDialect("/pooling", "pool-", PoolingItem, PoolingAnswer)

_DECODER = BodyDecoder(EmbeddingRequest)


def decode(data: bytes, limits: LimitsConfig) -> Embedding:
    """What the body asks for. Raises `InvalidRequest`, naming the field.

    A text that is too long is cut at its end, unless `truncation_side` says else: so do the tokenizers of such models.
    """
    body, undecoded = _DECODER.decode(data)
    warnings = check_undecoded(undecoded, generates=False) if undecoded else ()
    inputs = read_prompts("input", body.input, limits.max_embedding_inputs, body.add_special_tokens is not False)
    is_list = isinstance(body.input, list) and not isinstance(body.input[0], int)
    cut = None
    if body.truncate_prompt_tokens is not None:
        cut = truncation(body.truncate_prompt_tokens, body.truncation_side or "right")
    dimensions: Any = body.dimensions  # PoolingParams refuses what is no whole number
    if isinstance(dimensions, float) and dimensions.is_integer():
        dimensions = int(dimensions)  # JSON may write 6 as 6.0
    return Embedding(
        model=body.model,
        inputs=inputs,
        names=tuple(f"input[{number}]" for number in range(len(inputs))) if is_list else ("input",),
        params=PoolingParams(pooling=body.pooling, dimensions=dimensions, normalize=body.normalize is not False),
        is_base64=body.encoding_format == "base64",
        truncation=cut,
        cache_salt=body.cache_salt or "",
        priority=body.priority,
        warnings=warnings,
    )


def encode_item(dialect: EmbeddingDialect, index: int, embedding: array[float], *, is_base64: bool) -> msgspec.Raw:
    """One item of an answer: of a long one each is made by itself, since a list of numbers takes its time."""
    value: Any = embedding.tolist()
    if is_base64:
        if sys.byteorder == "big":
            embedding = array("f", embedding)
            embedding.byteswap()
        value = base64.b64encode(embedding.tobytes()).decode()
    kind: Any = dialect.item
    return msgspec.Raw(encode_json(kind(dialect.item.__name__.removesuffix("Item").lower(), index, value)))


def encode_answer(
    dialect: EmbeddingDialect, items: Sequence[msgspec.Raw], usage: EmbeddingUsage, **others: Any
) -> bytes:
    """The whole answer; `others` are its `id`, the `model`'s name as the client wrote it, and `warnings`."""
    kind: Any = dialect.answer
    return encode_json(kind(data=items, usage=usage, created=int(time.time()), **others))

"""Admission: refuses requests that can never be served, and reports the limits that it cut.

Checks need only the request, the backend's real capacity and the configured limits; no queue and no blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from brlite.config.options import LimitsConfig
from brlite.engine.backend import BackendInfo
from brlite.engine.request import Request
from brlite.engine.scoring import SCORING
from brlite.errors import EngineError, InvalidRequest, PromptTooLong
from brlite.sampling_params import PoolingParams, SamplingParams, check_token_ids


def admit(request: Request, info: BackendInfo, limits: LimitsConfig) -> tuple[int, tuple[str, ...]]:
    """The token limit of each completion, and a warning for each value that was cut. Raises `InvalidRequest`.

    As in the manual, `max_tokens` beyond half of `build_seq` is cut to that; here the answer says so. A prompt whose
    embedding is wanted may fill the context.
    """
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt must hold at least one token", param="prompt")
    num_prompt_tokens, length = len(request.prompt_token_ids), context_length(info)
    num_further = 0 if request.pooling is not None else 1
    if num_prompt_tokens > length - num_further:
        raise prompt_too_long(num_prompt_tokens, info, num_further=num_further)
    if min(request.prompt_token_ids) < 0 or max(request.prompt_token_ids) >= info.vocab_size:
        check_token_ids(request.prompt_token_ids, info.vocab_size, param="prompt")
    if request.pooling is not None:
        if request.pooling is not SCORING:
            check_pooling(request.pooling, info)
        return 0, ()
    if not info.can_generate:
        raise InvalidRequest("this model does not generate: it has no head for it", code="no_language_model_head")
    check_limits(request.params, limits, info.vocab_size)
    if request.params.best_of is not None and not request.params.use_beam_search:
        raise InvalidRequest("best_of is not for completions that are given as they come", param="best_of")
    if request.params.prompt_logprobs is not None and not info.has_prompt_logprobs:
        raise InvalidRequest("prompt_logprobs cannot be had from this server's engine", param="prompt_logprobs")
    if request.processors is not None and not info.runs_logits_processors:
        raise InvalidRequest("logits_processors cannot be had from this server's engine", param="logits_processors")

    half = max(1, info.max_model_len // 2)
    allowed = min(half, length - num_prompt_tokens)
    asked = request.params.max_tokens
    warnings: tuple[str, ...] = ()
    max_tokens = allowed if asked is None else min(asked, allowed)
    if asked is not None and asked > allowed:
        reason = f"half of build_seq {info.max_model_len}" if allowed == half else "what the context has left"
        if request.is_strict:
            raise InvalidRequest(
                f"max_tokens must be at most {allowed}, {reason}, got {asked}; strict is set", param="max_tokens"
            )
        warnings = (f"max_tokens {asked} was cut to {allowed}, {reason}",)
    if request.params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most {max_tokens}, what an answer to this prompt can have on this server, "
            f"got {request.params.min_tokens}",
            param="min_tokens",
        )
    return max_tokens, warnings


def check_prepared(request: Request) -> None:
    """Raise `EngineError` if the grammar, the bad words or the logits processors of the parameters were not made.

    Raises `InvalidRequest` if `allowed_token_ids` has no token that the grammar allows first.
    """
    params = request.params
    if params.structured is not None and request.grammar is None:
        raise EngineError("the request's structured output was not compiled")
    if params.bad_words and request.bad_words is None:
        raise EngineError("the request's bad words were not encoded")
    if params.logits_processors and request.processors is None:
        raise EngineError("the request's logits processors were not made")
    allowed = params.allowed_token_ids
    if request.grammar is not None and allowed and not request.grammar.may_begin_with(allowed):
        raise InvalidRequest(
            "allowed_token_ids has no token that an answer of this structure may begin with", param="allowed_token_ids"
        )


def read_token_ids(token_ids: Iterable[object]) -> list[int]:
    """A copy, as plain integers, of what a caller gave as token ids. Raises `InvalidRequest` for anything else."""
    try:
        if isinstance(token_ids, list) and set(map(type, token_ids)) == {int}:
            return token_ids.copy()  # the usual case, five times as fast as the check below
        return [operator.index(token_id) for token_id in token_ids]  # type: ignore[arg-type]  # raises for others
    except TypeError:
        raise InvalidRequest("the prompt must be a list of integer token ids", param="prompt") from None


def context_length(info: BackendInfo) -> int:
    """The most tokens that a sequence can have: `build_seq`, or the size of the whole cache if that is less."""
    return min(info.max_model_len, info.num_blocks * info.block_size)


def check_pooling(params: PoolingParams, info: BackendInfo) -> None:
    """Raise `InvalidRequest` for an embedding that this model or its backend cannot compute."""
    if not info.hidden_size:
        raise InvalidRequest("embeddings cannot be had from this server's engine", code="embeddings_not_supported")
    if info.pooling == "none":
        raise InvalidRequest(
            "this model has no embeddings, by its files or by this server's setting pooling",
            code="embeddings_not_supported",
        )
    size, allowed = params.dimensions, info.matryoshka_dimensions
    if size is None or size == info.hidden_size or (size < info.hidden_size and (size in allowed or 0 in allowed)):
        return
    shorter = f"1 to {info.hidden_size}" if 0 in allowed else ", ".join(map(str, (*allowed, info.hidden_size)))
    raise InvalidRequest(
        f"dimensions must be {shorter} for this model, got {size}; the lengths that its embeddings may be cut to are "
        "those of its config.json or of this server's setting matryoshka_dimensions",
        param="dimensions",
    )


def prompt_too_long(
    num_tokens: int, info: BackendInfo, *, param: str = "prompt", at_least: str = "", num_further: int = 1
) -> PromptTooLong:
    """The error for a prompt of `num_tokens`, which leaves no room for the `num_further` tokens of a completion."""
    length = context_length(info)
    setting = "num_blocks" if length < info.max_model_len else "build_seq"
    error = PromptTooLong(
        f"This model's maximum context length is {length} tokens{', prompt and completion together' * num_further}, "
        f"by this server's setting {setting}; the prompt has {at_least}{num_tokens} tokens",
        param=param,
    )
    error.num_tokens, error.max_tokens = num_tokens, length - num_further
    return error


def check_limits(params: SamplingParams, limits: LimitsConfig, vocab_size: int | None = None) -> None:
    """Raise `InvalidRequest` for values beyond the server's limits, or beyond a vocabulary of `vocab_size`."""
    beams = "n" if params.best_of is None else "best_of"
    for name, value, key in (
        ("n", params.n, "max_n"),
        (beams, params.beam_width if params.use_beam_search else 0, "max_beam_width"),
        ("logprobs", params.logprobs or 0, "max_logprobs"),
        ("prompt_logprobs", params.prompt_logprobs or 0, "max_logprobs"),
    ):
        if value > (limit := getattr(limits, key)):
            raise InvalidRequest(
                f"{name} must be at most {limit} on this server (limits.{key}), got {value}", param=name
            )
    for name, count, key in (
        ("stop", len(params.stop), "max_stop_strings"),
        ("stop_token_ids", len(params.stop_token_ids), "max_stop_strings"),
        ("dry_sequence_breakers", len(params.dry_sequence_breakers), "max_stop_strings"),
        ("logit_bias", len(params.logit_bias), "max_logit_bias"),
        ("allowed_token_ids", len(params.allowed_token_ids), "max_logit_bias"),
    ):
        if count > (limit := getattr(limits, key)):
            raise InvalidRequest(
                f"{name} must have at most {limit} entries on this server (limits.{key}), got {count}", param=name
            )
    longest = max(map(len, params.stop), default=0)
    if longest > limits.max_stop_length:
        raise InvalidRequest(
            f"a stop string may have at most {limits.max_stop_length} characters on this server "
            f"(limits.max_stop_length), got {longest}",
            param="stop",
        )
    if vocab_size is None:
        return
    if params.top_k > vocab_size:
        raise InvalidRequest(f"top_k must be -1, 0 or 1 to {vocab_size}, got {params.top_k}", param="top_k")
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        if token_ids := getattr(params, name):
            check_token_ids(token_ids, vocab_size, param=name)

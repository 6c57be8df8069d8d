"""The engine's door: what can never be served is refused here, and what is cut to fit is said.

Checks need only the request, the backend's real capacity and the configured limits; no queue and no blocks.
"""

from __future__ import annotations

from brlite.config import LimitsConfig
from brlite.engine.backend import BackendInfo
from brlite.engine.request import Request
from brlite.errors import InvalidRequest, PromptTooLong
from brlite.sampling_params import SamplingParams, check_token_ids


def admit(request: Request, info: BackendInfo, limits: LimitsConfig) -> tuple[int, tuple[str, ...]]:
    """How many tokens each completion may have, and a line for each clamp. Raises `InvalidRequest`.

    As in the manual, `max_tokens` beyond half the context is cut to half the context; here the answer says so.
    """
    check_prompt(request.prompt_token_ids, info)
    _check_limits(request.params, limits)
    request.params.check_vocabulary(info.vocab_size)
    max_tokens, warnings = _clamp_max_tokens(request, info)
    num_blocks = -(-(len(request.prompt_token_ids) + max_tokens) // info.block_size)
    if num_blocks > info.num_blocks:
        raise InvalidRequest(
            f"prompt and max_tokens need {num_blocks} cache blocks of {info.block_size} tokens; this server has "
            f"{info.num_blocks}",
            param="max_tokens",
        )
    return max_tokens, warnings


def check_prompt(token_ids: list[int], info: BackendInfo) -> None:
    """Raise `InvalidRequest` for a prompt that is empty, too long, or holds ids outside the vocabulary."""
    if not token_ids:
        raise InvalidRequest("the prompt must hold at least one token", param="prompt")
    check_length(len(token_ids), info)
    check_token_ids(token_ids, info.vocab_size, param="prompt")


def check_length(num_tokens: int, info: BackendInfo, *, param: str = "prompt", at_least: str = "") -> None:
    """Raise `PromptTooLong` for a prompt that leaves no room for a completion."""
    if num_tokens >= info.max_model_len:
        raise PromptTooLong(
            f"This model's maximum context length is {info.max_model_len} tokens, prompt and completion together; "
            f"the prompt has {at_least}{num_tokens} tokens",
            param=param,
        )


def _check_limits(params: SamplingParams, limits: LimitsConfig) -> None:
    for name, value, limit in (
        ("n", params.n, limits.max_n),
        ("logprobs", params.logprobs or 0, limits.max_logprobs),
        ("prompt_logprobs", params.prompt_logprobs or 0, limits.max_logprobs),
    ):
        if value > limit:
            raise InvalidRequest(f"{name} must be at most {limit} on this server, got {value}", param=name)
    for name, count, limit in (
        ("stop", len(params.stop), limits.max_stop_strings),
        ("stop_token_ids", len(params.stop_token_ids), limits.max_stop_strings),
        ("logit_bias", len(params.logit_bias), limits.max_logit_bias),
    ):
        if count > limit:
            raise InvalidRequest(f"{name} must have at most {limit} entries on this server, got {count}", param=name)
    longest = max(map(len, params.stop), default=0)
    if longest > limits.max_stop_length:
        raise InvalidRequest(
            f"a stop string may have at most {limits.max_stop_length} characters on this server, got {longest}",
            param="stop",
        )


def _clamp_max_tokens(request: Request, info: BackendInfo) -> tuple[int, tuple[str, ...]]:
    asked = request.params.max_tokens
    half = max(1, info.max_model_len // 2)
    left = info.max_model_len - len(request.prompt_token_ids)
    max_tokens = min(half, left) if asked is None else min(asked, half, left)
    if asked is None or asked == max_tokens:
        return max_tokens, ()
    reason = f"half of build_seq {info.max_model_len}" if max_tokens == half else "what the context has left"
    return max_tokens, (f"max_tokens {asked} was cut to {max_tokens}, {reason}",)

"""The sampling table: every parameter with its default and its range, the same online and offline.

Ranges that depend on the model (top_k and token ids against the vocabulary) are checked by `check_vocabulary`,
which the engine calls at its door. The mathematics is in `brlite/worker/sampler.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from brlite.errors import InvalidRequest

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing logits by it would overflow fp32
MAX_LOGIT_BIAS = 100.0
SEED_RANGE = (-(2**63), 2**64 - 1)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the tokens of a completion. Raises `InvalidRequest`, naming the field, when out of range.

    `stop` takes a string or a list; `stop_tokens_ids` is the manual's spelling of `stop_token_ids`, and both add up.
    `max_tokens=None` means as many as the context allows. `logprobs` and `prompt_logprobs` count the alternatives
    reported beside each token (0: only the token itself).
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_tokens_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_counts()
        if any(text == "" for text in self.stop):
            raise InvalidRequest("stop must not hold an empty string", param="stop")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` where `top_k` or a token id lies outside a vocabulary of `vocab_size` tokens."""
        if self.top_k > vocab_size:
            raise InvalidRequest(f"top_k must be -1 or 1 to {vocab_size}, got {self.top_k}", param="top_k")
        check_token_ids(self.stop_token_ids, vocab_size, param="stop_token_ids")
        check_token_ids(self.logit_bias, vocab_size, param="logit_bias")

    def _normalise(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        ids = tuple(dict.fromkeys((*self.stop_token_ids, *self.stop_tokens_ids)))
        for name, value in (("stop", stop), ("stop_token_ids", ids), ("stop_tokens_ids", ())):
            msgspec.structs.force_setattr(self, name, value)

    def _check_numbers(self) -> None:
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidRequest(f"{name} must be a finite number, got {getattr(self, name)}", param=name)
        _require(self.repetition_penalty > 0, "repetition_penalty", "above 0", self.repetition_penalty)
        _require(self.temperature >= 0, "temperature", "at least 0", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        for bias in self.logit_bias.values():
            _require(abs(bias) <= MAX_LOGIT_BIAS, "logit_bias", f"in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]", bias)

    def _check_counts(self) -> None:
        _require(self.n >= 1, "n", "at least 1", self.n)
        _require(self.top_k == -1 or self.top_k >= 1, "top_k", "-1 or at least 1", self.top_k)
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _require(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        if self.max_tokens is not None:
            _require(self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens", self.min_tokens)
        _require(self.logprobs is None or self.logprobs >= 0, "logprobs", "at least 0", self.logprobs)
        _require(
            self.prompt_logprobs is None or self.prompt_logprobs >= 0,
            "prompt_logprobs",
            "at least 0",
            self.prompt_logprobs,
        )
        if self.seed is not None:
            low, high = SEED_RANGE
            _require(low <= self.seed <= high, "seed", "a 64-bit integer", self.seed)


def check_token_ids(token_ids: Iterable[int], vocab_size: int, *, param: str) -> None:
    """Raise `InvalidRequest` at the first id outside 0 to `vocab_size` - 1."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{param} holds token id {token_id}; allowed are 0 to {vocab_size - 1}", param=param)


def _require(is_allowed: bool, param: str, allowed: str, got: object) -> None:
    if not is_allowed:
        raise InvalidRequest(f"{param} must be {allowed}, got {got}", param=param)

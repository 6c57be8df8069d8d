"""The engine's outputs. Plain data: no text is rendered here and nothing is computed.

There are thousands of outputs a second. They are never in a reference cycle, so they have `gc=False`.
"""

from __future__ import annotations

import math
from array import array

import msgspec

from brlite.sampling_params import FinishReason


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """One token with the logarithm of its probability, and its most probable alternatives, best first.

    Probabilities are the model's own: before temperature, penalties and truncation. `top` holds (token id, logprob).
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class CompletionOutput(msgspec.Struct, kw_only=True, gc=False):
    """One of a request's `n` completions. `stop_reason` is the stop string or token id that ended it, if one did.

    With the finish reason "error" it is the reason: the tokens that its grammar allows could not be computed.
    """

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def mean_logprob(self) -> float:
        """The mean logprob of its tokens; minus infinity without logprobs."""
        logprobs = [entry.logprob for entry in self.logprobs or ()]
        return sum(logprobs) / len(logprobs) if logprobs else -math.inf

    def merge(self, later: CompletionOutput) -> None:
        """Append a later delta of the same completion."""
        self.text += later.text
        self.token_ids.extend(later.token_ids)
        if later.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.extend(later.logprobs)
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


class RequestTimes(msgspec.Struct, frozen=True):
    """Where a request's time went, in seconds: arrival to its first step, to its first token, to its end."""

    queue: float
    prefill: float
    decode: float


class RequestOutput(msgspec.Struct, kw_only=True, gc=False):
    """The changes in a request since its last output; `LLM.generate` returns a merged one of the whole request.

    `prompt_logprobs` has one entry for each prompt token, the first of them None; it comes with the first output.
    `embedding` (float32) is the last output of a request for one, whose only completion is empty.
    `num_searched_tokens` counts the tokens drawn for all beams of a beam search, whose answers come in one output.
    `warnings` has every cut limit and fallback of the request. `times` come with the last output.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt: str | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    num_searched_tokens: int = 0
    embedding: array[float] | None = None
    warnings: tuple[str, ...] = ()
    times: RequestTimes | None = None

    def merge(self, later: RequestOutput) -> None:
        """Append a later delta of the same request."""
        by_index = {output.index: output for output in self.outputs}
        for output in later.outputs:
            if output.index in by_index:
                by_index[output.index].merge(output)
            else:
                self.outputs.append(output)
        self.finished, self.times = later.finished, later.times
        self.num_cached_tokens = later.num_cached_tokens
        self.num_searched_tokens = later.num_searched_tokens
        self.embedding = later.embedding
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs

    def keep_best(self, num_kept: int, *, keeps_logprobs: bool) -> int:
        """Keep only the `num_kept` completions with the highest mean logprob, best first. For a finished output.

        Returns the number of tokens of the others.
        """
        self.outputs.sort(key=lambda each: (-each.mean_logprob, each.index))
        num_tokens = sum(len(each.token_ids) for each in self.outputs[num_kept:])
        del self.outputs[num_kept:]
        for index, completion in enumerate(self.outputs):
            completion.index = index
            if not keeps_logprobs:
                completion.logprobs = None
        return num_tokens

"""The engine's outputs to OpenAI's answers: whole bodies and stream chunks, as JSON bytes.

One answer covers all prompts of one HTTP request; a choice's index is prompt index times `n` plus completion index.
It does no I/O: `handlers.py` decides when the bytes go out.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Protocol

from msgspec import UNSET, UnsetType

from brlite.outputs import CompletionOutput, RequestOutput, TokenLogprob
from brlite.server.logprobs import chat_logprobs, completion_logprobs
from brlite.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    Delta,
    PromptTokensDetails,
    Usage,
    encode,
)
from brlite.tokenizer import Tokenizer


class Answer(Protocol):
    """What the handlers need of either kind of answer. It can be made before its model is there, but says nothing yet.

    Its id and count are there from the beginning; `set_source` comes before everything else.
    """

    id: str
    count: TokenCount

    def set_source(self, tokenizer: Tokenizer, fingerprint: str) -> None:
        """Whose words these are. `fingerprint` is the backend's, empty if it has none."""
        ...

    def opening(self) -> list[bytes]:
        """The chunks that a stream begins with."""
        ...

    def chunks(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        """The chunks for one delta of one prompt's request."""
        ...

    def closing(self) -> list[bytes]:
        """The chunks after the last delta: the usage, if it was asked for."""
        ...

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The body that answers a request that is not streamed; one finished output a prompt."""
        ...


class TokenCount:
    """Tokens used by one HTTP request, counted from its deltas; those of completions only if they are shown."""

    def __init__(self, *, shows_completions: bool = True) -> None:
        self.prompt = 0
        self.cached = 0
        self.completion = 0
        self._shows_completions = shows_completions
        self._seen: set[int] = set()

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        if prompt_index not in self._seen:
            self._seen.add(prompt_index)
            self.prompt += len(output.prompt_token_ids)
            self.cached += output.num_cached_tokens
        if self._shows_completions:
            self.completion += sum(len(completion.token_ids) for completion in output.outputs)

    def usage(self) -> Usage:
        total = self.prompt + self.completion
        return Usage(self.prompt, self.completion, total, PromptTokensDetails(self.cached))


class ChatAnswer:
    """Chat completions: one prompt, `n` choices."""

    _tokenizer: Tokenizer
    _system_fingerprint: str | UnsetType

    def __init__(self, model: str, *, n: int, include_usage: bool = False, warnings: Sequence[str] = ()) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.count = TokenCount()
        self._created = int(time.time())
        self._model = model
        self._n = n
        self._include_usage = include_usage
        self._warnings = warnings

    def set_source(self, tokenizer: Tokenizer, fingerprint: str) -> None:
        self._tokenizer, self._system_fingerprint = tokenizer, _system_fingerprint(fingerprint)

    def opening(self) -> list[bytes]:
        first = Delta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index, first)], self._no_usage) for index in range(self._n)]

    def chunks(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        self.count.add(prompt_index, output)
        shown = [completion for completion in output.outputs if _has_news(completion)]
        return [
            self._chunk(
                [self._chunk_choice(completion)],
                self._no_usage,
                _last_warnings(output, self._warnings, completion is shown[-1]),
            )
            for completion in shown
        ]

    def closing(self) -> list[bytes]:
        return [self._chunk([], self.count.usage())] if self._include_usage else []

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        (output,) = outputs
        self.count.add(0, output)
        return encode(
            ChatCompletion(
                id=self.id,
                created=self._created,
                model=self._model,
                choices=[self._choice(completion) for completion in _in_order(output)],
                usage=self.count.usage(),
                system_fingerprint=self._system_fingerprint,
                warnings=[*self._warnings, *output.warnings] or UNSET,
            )
        )

    @property
    def _no_usage(self) -> UnsetType | None:
        return None if self._include_usage else UNSET

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        warnings: list[str] | UnsetType = UNSET,
    ) -> bytes:
        return encode(
            ChatChunk(
                id=self.id,
                created=self._created,
                model=self._model,
                choices=choices,
                usage=usage,
                system_fingerprint=self._system_fingerprint,
                warnings=warnings,
            )
        )

    def _chunk_choice(self, completion: CompletionOutput) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=completion.index,
            delta=Delta(content=completion.text),
            logprobs=chat_logprobs(completion.logprobs, self._tokenizer),
            finish_reason=completion.finish_reason,
            stop_reason=UNSET if completion.stop_reason is None else completion.stop_reason,
        )

    def _choice(self, completion: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            index=completion.index,
            message=AssistantMessage(completion.text),
            logprobs=chat_logprobs(completion.logprobs, self._tokenizer),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )


class CompletionAnswer:
    """Text completions: several prompts, `n` choices each; `echo` puts the prompt before its completions.

    With `echo` and 0 tokens asked for, the one token that the engine drew is neither shown nor counted.
    """

    _tokenizer: Tokenizer
    _system_fingerprint: str | UnsetType

    def __init__(
        self,
        model: str,
        *,
        n: int,
        echo: bool = False,
        is_echo_only: bool = False,
        include_usage: bool = False,
        warnings: Sequence[str] = (),
    ) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.count = TokenCount(shows_completions=not is_echo_only)
        self._created = int(time.time())
        self._model = model
        self._n = n
        self._echo = echo
        self._is_echo_only = is_echo_only
        self._include_usage = include_usage
        self._warnings = warnings
        self._offsets: dict[int, int] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}

    def set_source(self, tokenizer: Tokenizer, fingerprint: str) -> None:
        self._tokenizer, self._system_fingerprint = tokenizer, _system_fingerprint(fingerprint)

    def opening(self) -> list[bytes]:
        return []

    def chunks(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        self.count.add(prompt_index, output)
        shown = [completion for completion in output.outputs if _has_news(completion)]
        return [
            self._encode(
                [self._choice(prompt_index, output, completion)],
                None if self._include_usage else UNSET,
                _last_warnings(output, self._warnings, completion is shown[-1]),
            )
            for completion in shown
        ]

    def closing(self) -> list[bytes]:
        return [self._encode([], self.count.usage())] if self._include_usage else []

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        choices = []
        for prompt_index, output in enumerate(outputs):
            self.count.add(prompt_index, output)
            choices += [self._choice(prompt_index, output, completion) for completion in _in_order(output)]
        warnings = dict.fromkeys([*self._warnings, *(line for output in outputs for line in output.warnings)])
        return self._encode(choices, self.count.usage(), list(warnings) or UNSET)

    def _encode(
        self,
        choices: list[CompletionChoice],
        usage: Usage | UnsetType | None,
        warnings: list[str] | UnsetType = UNSET,
    ) -> bytes:
        return encode(
            Completion(
                id=self.id,
                created=self._created,
                model=self._model,
                choices=choices,
                usage=usage,
                system_fingerprint=self._system_fingerprint,
                warnings=warnings,
            )
        )

    def _choice(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        if output.prompt_logprobs is not None:  # they come once, and every choice of the prompt echoes them
            self._prompt_logprobs[prompt_index] = output.prompt_logprobs
        index = prompt_index * self._n + completion.index
        is_first = index not in self._offsets
        if self._is_echo_only:
            completion = _hidden(completion)
        logprobs = completion_logprobs(
            output.prompt_token_ids if self._echo and is_first else (),
            self._prompt_logprobs.get(prompt_index),
            completion.logprobs,
            self._tokenizer,
            self._offsets.get(index, 0),
        )
        self._offsets[index] = self._offsets.get(index, 0) + (sum(map(len, logprobs.tokens)) if logprobs else 0)
        return CompletionChoice(
            index=index,
            text=self._prompt_text(output) + completion.text if self._echo and is_first else completion.text,
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _system_fingerprint(fingerprint: str) -> str | UnsetType:
    return f"fp_{fingerprint}" if fingerprint else UNSET


def _hidden(completion: CompletionOutput) -> CompletionOutput:
    """A completion of which nothing is to be seen, but that it ended for length."""
    logprobs: list[TokenLogprob] | None = None if completion.logprobs is None else []
    return CompletionOutput(index=completion.index, logprobs=logprobs, finish_reason="length")


def _has_news(completion: CompletionOutput) -> bool:
    """Whether a delta is worth a chunk: part of a character, or of a possible stop string, is not."""
    return bool(completion.text or completion.finish_reason or completion.logprobs)


def _last_warnings(output: RequestOutput, warnings: Sequence[str], is_last: bool) -> list[str] | UnsetType:
    """What a stream's last chunk says: every clamp and everything ignored."""
    return [*warnings, *output.warnings] or UNSET if output.finished and is_last else UNSET


def _in_order(output: RequestOutput) -> list[CompletionOutput]:
    return sorted(output.outputs, key=lambda completion: completion.index)

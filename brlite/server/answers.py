"""The engine's outputs to OpenAI's answers: whole bodies and stream chunks, as JSON bytes.

One answer covers all prompts of one HTTP request; a choice's index is prompt index times `n` plus completion index.
It does no I/O: `handlers.py` decides when the bytes go out.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from brlite.outputs import CompletionOutput, RequestOutput, TokenLogprob
from brlite.server.logprobs import (
    NOT_ECHOED,
    EchoedPrompt,
    TokenNames,
    TokenTrack,
    ToldToken,
    chat_logprobs,
    completion_logprobs,
    prompt_offsets,
)
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


class AnswerForm(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is told: under which model's name, with which choices, and what stands beside them.

    `continuous_usage` says in every chunk of a stream what was used so far.
    """

    model: str
    n: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    skips_special_tokens: bool = True
    names_are_ids: bool = False
    echo: bool = False
    is_echo_only: bool = False


class Answer(Protocol):
    """What the handlers need of either kind of answer. It can be made before its model is there, but says nothing yet.

    Its id and count are there from the beginning; `set_source` comes before everything else.
    """

    id: str
    count: TokenCount

    def set_source(self, tokenizer: Tokenizer, fingerprint: str) -> None:
        """Whose words these are. `fingerprint` is the backend's, empty if it has none."""
        ...

    def warn(self, warnings: Sequence[str]) -> None:
        """Have the answer say these, too."""
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


class _Told:
    """What both kinds of answer share."""

    _names: TokenNames
    _system_fingerprint: str | UnsetType

    def __init__(self, form: AnswerForm, prefix: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.count = TokenCount(shows_completions=not form.is_echo_only)
        self._created = int(time.time())
        self._form = form
        self._warnings: list[str] = []
        self._tracks: dict[int, TokenTrack] = {}

    def set_source(self, tokenizer: Tokenizer, fingerprint: str) -> None:
        self._names = TokenNames(tokenizer, are_ids=self._form.names_are_ids)
        self._system_fingerprint = f"fp_{fingerprint}" if fingerprint else UNSET

    def warn(self, warnings: Sequence[str]) -> None:
        self._warnings += warnings

    def _told(self, index: int, completion: CompletionOutput, start: int = 0) -> list[ToldToken]:
        """The tokens to tell with a delta of the choice with that index, whose text begins at `start`."""
        if completion.logprobs is None:
            return []
        if index not in self._tracks:
            tokenizer = self._names.tokenizer
            skipped = tokenizer.special_token_ids if self._form.skips_special_tokens else frozenset[int]()
            self._tracks[index] = TokenTrack(tokenizer, skipped, start)
        return self._tracks[index].take(completion)

    def _chunk_usage(self, *, has_tokens: bool) -> Usage | UnsetType | None:
        """What a chunk says of the usage, but for the last one, which has nothing else."""
        if self._form.continuous_usage and has_tokens:
            return self.count.usage()
        return None if self._form.include_usage else UNSET

    def _last_warnings(self, output: RequestOutput, *, is_last: bool) -> list[str] | UnsetType:
        """What a stream's last chunk says: every clamp and everything ignored."""
        return [*self._warnings, *output.warnings] or UNSET if output.finished and is_last else UNSET


class ChatAnswer(_Told):
    """Chat completions: one prompt, `n` choices."""

    def __init__(self, form: AnswerForm) -> None:
        super().__init__(form, "chatcmpl")

    def opening(self) -> list[bytes]:
        first = Delta(role="assistant", content="", refusal=None)
        usage = self._chunk_usage(has_tokens=False)
        return [self._chunk([ChatChunkChoice(index, first)], usage) for index in range(self._form.n)]

    def chunks(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        self.count.add(prompt_index, output)
        choices = [choice for choice in map(self._chunk_choice, output.outputs) if choice is not None]
        usage = self._chunk_usage(has_tokens=True)
        return [
            self._chunk([choice], usage, self._last_warnings(output, is_last=choice is choices[-1]))
            for choice in choices
        ]

    def closing(self) -> list[bytes]:
        return [self._chunk([], self.count.usage())] if self._form.include_usage else []

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        (output,) = outputs
        self.count.add(0, output)
        return encode(
            ChatCompletion(
                id=self.id,
                created=self._created,
                model=self._form.model,
                choices=[self._choice(completion) for completion in _in_order(output)],
                usage=self.count.usage(),
                system_fingerprint=self._system_fingerprint,
                warnings=[*self._warnings, *output.warnings] or UNSET,
            )
        )

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
                model=self._form.model,
                choices=choices,
                usage=usage,
                system_fingerprint=self._system_fingerprint,
                warnings=warnings,
            )
        )

    def _chunk_choice(self, completion: CompletionOutput) -> ChatChunkChoice | None:
        """None for a delta that is not worth a chunk."""
        told = self._told(completion.index, completion)
        if not _has_news(completion, told):
            return None
        return ChatChunkChoice(
            index=completion.index,
            delta=Delta(content=completion.text),
            logprobs=None if completion.logprobs is None else chat_logprobs(told, self._names),
            finish_reason=completion.finish_reason,
            stop_reason=UNSET if completion.stop_reason is None else completion.stop_reason,
        )

    def _choice(self, completion: CompletionOutput) -> ChatChoice:
        told = self._told(completion.index, completion)
        return ChatChoice(
            index=completion.index,
            message=AssistantMessage(completion.text),
            logprobs=None if completion.logprobs is None else chat_logprobs(told, self._names),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )


class CompletionAnswer(_Told):
    """Text completions: several prompts, `n` choices each; `echo` puts the prompt before its completions.

    With `echo` and 0 tokens asked for, the one token that the engine drew is neither shown nor counted.
    """

    def __init__(self, form: AnswerForm) -> None:
        super().__init__(form, "cmpl")
        self._echoed_choices: set[int] = set()
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}

    def opening(self) -> list[bytes]:
        return []

    def chunks(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        self.count.add(prompt_index, output)
        told = [self._choice(prompt_index, output, completion) for completion in output.outputs]
        choices = [choice for choice in told if choice is not None]
        usage = self._chunk_usage(has_tokens=True)
        return [
            self._encode([choice], usage, self._last_warnings(output, is_last=choice is choices[-1]))
            for choice in choices
        ]

    def closing(self) -> list[bytes]:
        return [self._encode([], self.count.usage())] if self._form.include_usage else []

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        choices: list[CompletionChoice] = []
        for prompt_index, output in enumerate(outputs):
            self.count.add(prompt_index, output)
            told = (self._choice(prompt_index, output, completion) for completion in _in_order(output))
            choices += [choice for choice in told if choice is not None]  # each is, for each has ended
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
                model=self._form.model,
                choices=choices,
                usage=usage,
                system_fingerprint=self._system_fingerprint,
                warnings=warnings,
            )
        )

    def _choice(
        self, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> CompletionChoice | None:
        """None for a delta that is not worth a chunk. The first delta of a choice brings the echoed prompt."""
        if output.prompt_logprobs is not None:  # they come once, and every choice of the prompt echoes them
            self._prompt_logprobs[prompt_index] = output.prompt_logprobs
        index = prompt_index * self._form.n + completion.index
        is_echoed = self._form.echo and index not in self._echoed_choices
        self._echoed_choices.add(index)
        prompt = self._prompt_text(output) if is_echoed else ""
        if self._form.is_echo_only:
            completion = _hidden(completion)
        told = self._told(index, completion, len(prompt))
        if not (is_echoed or _has_news(completion, told)):
            return None
        logprobs = None
        if completion.logprobs is not None:
            echoed = self._echoed(prompt_index, output) if is_echoed else NOT_ECHOED
            logprobs = completion_logprobs(told, self._names, echoed)
        return CompletionChoice(
            index=index,
            text=prompt + completion.text,
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )

    def _echoed(self, prompt_index: int, output: RequestOutput) -> EchoedPrompt:
        offsets = prompt_offsets(output.prompt, output.prompt_token_ids, self._names.tokenizer)
        return EchoedPrompt(output.prompt_token_ids, offsets, self._prompt_logprobs.get(prompt_index, ()))

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._names.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _hidden(completion: CompletionOutput) -> CompletionOutput:
    """A completion of which nothing is to be seen, but that it ended for length."""
    logprobs: list[TokenLogprob] | None = None if completion.logprobs is None else []
    return CompletionOutput(index=completion.index, logprobs=logprobs, finish_reason="length")


def _has_news(completion: CompletionOutput, told: Sequence[ToldToken]) -> bool:
    """Whether a delta is worth a chunk: part of a character, or of a possible stop string, is not."""
    return bool(completion.text or completion.finish_reason or told)


def _in_order(output: RequestOutput) -> list[CompletionOutput]:
    return sorted(output.outputs, key=lambda completion: completion.index)

"""OpenAI's text completions: several prompts, `n` answers each. With `echo` each completion begins with its prompt.

With `echo` and `max_tokens` 0, the one token that the engine must draw is neither shown nor counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from brlite.config.options import LimitsConfig
from brlite.dialects.dialect import Dialect
from brlite.dialects.event import EndReason, Event, Token, TokenUsage
from brlite.dialects.fields import NOTHING_MORE
from brlite.dialects.generation import Generation, Infill, Prompt, Text, TokenIds
from brlite.dialects.json_body import BodyDecoder, check_num_entries
from brlite.dialects.openai import (
    SamplingFields,
    Whole,
    completion_fields,
    sampling_params,
    structured_output,
    take_undecoded,
)
from brlite.dialects.openai_answer import (
    LOWEST_LOGPROB,
    OpenAIEncoder,
    PromptLogprobs,
    Usage,
    encode_error,
    encode_json,
    shown_prompt_logprobs,
    shown_usage,
    token_name,
)
from brlite.dialects.sse import frame
from brlite.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's; a chat's default is the engine's


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: bool | Whole | None = None
    add_special_tokens: bool | None = None


class CompletionLogprobs(Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: EndReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    """A whole completion, or one chunk of it. Both have the same shape in OpenAI's API."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType = UNSET
    warnings: Sequence[str] | UnsetType = UNSET


_DECODER = BodyDecoder(CompletionRequest)
_FIELD_NAMES = {"prompt_logprobs": "logprobs"}


def decode(data: bytes, limits: LimitsConfig) -> Generation:
    """Decode the body. Raises `InvalidRequest`, naming the field.

    With `echo`, `logprobs` covers the prompt too, and `max_tokens` may be 0.
    """
    body, undecoded = _DECODER.decode(data)
    more = take_undecoded(body, undecoded) if undecoded else NOTHING_MORE
    prompts: tuple[Prompt, ...] = read_prompts(
        "prompt", body.prompt, limits, "max_prompts", body.add_special_tokens is not False
    )
    fields = completion_fields(body, more, len(prompts), limits)
    if body.suffix:
        prompts = _with_suffix(prompts, body.suffix, body)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    is_echo_only = bool(body.echo) and max_tokens == 0
    logprobs = None if body.logprobs is False else body.logprobs
    prompt_logprobs = logprobs if body.echo else None
    field_names = {**_FIELD_NAMES, **more.field_names}
    if body.prompt_logprobs is not None:
        if prompt_logprobs not in (None, body.prompt_logprobs):
            raise InvalidRequest("prompt_logprobs must be what logprobs is, beside echo", param="prompt_logprobs")
        prompt_logprobs = body.prompt_logprobs
        field_names["prompt_logprobs"] = "prompt_logprobs"
    params = sampling_params(
        body,
        limits,
        field_names,
        max_tokens=1 if is_echo_only else max_tokens,  # the engine draws at least one token
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured=structured_output(body),
        **more.sampling,
    )
    return Generation(
        prompts=prompts,
        params=params,
        echo=bool(body.echo),
        is_echo_only=is_echo_only,
        field_names=field_names,
        **fields,
    )


def _with_suffix(prompts: tuple[Prompt, ...], suffix: str, body: CompletionRequest) -> tuple[Infill, ...]:
    """Prompts to fill the gap between each prompt and the suffix. Raises `InvalidRequest`."""
    if body.echo or body.truncate_prompt_tokens is not None:
        raise InvalidRequest("suffix cannot be given with echo or truncate_prompt_tokens", param="suffix")
    infills = tuple(
        Infill(prompt.text, suffix, add_special_tokens=prompt.add_special_tokens)
        for prompt in prompts
        if isinstance(prompt, Text)
    )
    if len(infills) < len(prompts):
        raise InvalidRequest("suffix needs prompts that are texts, not token ids", param="suffix")
    return infills


class CompletionEncoder(OpenAIEncoder):
    """Encodes events as chunks, or as one whole answer."""

    _empty_text = b'"text":""'
    _has_reasoning = False

    def _chunk_of(self, event: Event) -> bytes:
        usage = self._no_usage if event.usage is None else shown_usage(event.usage)
        return self._chunk([self._choice(event)], usage, event.warnings)

    def _chunk(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None, warnings: Sequence[str] = ()
    ) -> bytes:
        return frame(self._completion(choices, usage, warnings))

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        """The body of a response that is not streamed. There is one event per choice."""
        return self._completion([self._choice(event) for event in events], shown_usage(usage), warnings)

    def _choice(self, event: Event) -> CompletionChoice:
        return CompletionChoice(
            index=event.choice,
            text=event.text,
            logprobs=None
            if event.tokens is None
            else completion_logprobs(event.tokens, names_are_ids=self._call.names_are_ids),
            finish_reason=event.finish_reason,
            stop_reason=event.stop_reason,
            token_ids=UNSET if event.token_ids is None else event.token_ids,
            prompt_token_ids=UNSET if event.prompt_token_ids is None else event.prompt_token_ids,
            prompt_logprobs=UNSET if event.prompt_tokens is None else shown_prompt_logprobs(event.prompt_tokens),
        )

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None, warnings: Sequence[str]
    ) -> bytes:
        return encode_json(Completion(**self._common, choices=choices, usage=usage, warnings=warnings or UNSET))


def completion_logprobs(tokens: Sequence[Token], *, names_are_ids: bool = False) -> CompletionLogprobs:
    """Logprobs as parallel lists. The alternatives of a position have unique names; the token itself is first."""
    top_logprobs: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:
            top_logprobs.append(None)
            continue
        named = {token_name(token.token, is_id=names_are_ids): max(token.logprob, LOWEST_LOGPROB)}
        for other, logprob in token.top:
            if other.token_id != token.token.token_id:
                named[token_name(other, is_id=names_are_ids, taken=named)] = max(logprob, LOWEST_LOGPROB)
        top_logprobs.append(named)
    return CompletionLogprobs(
        text_offset=[token.offset for token in tokens],
        token_logprobs=[None if token.logprob is None else max(token.logprob, LOWEST_LOGPROB) for token in tokens],
        tokens=[token_name(token.token, is_id=names_are_ids) for token in tokens],
        top_logprobs=top_logprobs,
    )


def read_prompts(
    field: str, prompt: str | list[str | int | list[int]], limits: LimitsConfig, key: str, adds_specials: bool
) -> tuple[Text | TokenIds, ...]:
    """Decode a text, a list of texts, a list of token ids, or a list of such lists. Raises `InvalidRequest` for more
    prompts than the limit with this key of `[limits]`."""
    if isinstance(prompt, str):
        return (Text(prompt, adds_specials),)
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return (TokenIds(prompt),)  # type: ignore[arg-type]  # proved by the line above
    check_num_entries(field, len(prompt), limits, key)
    if kinds == {str}:
        return tuple(Text(item, adds_specials) for item in prompt if isinstance(item, str))
    if kinds == {list}:
        return tuple(TokenIds(item) for item in prompt if isinstance(item, list))
    raise InvalidRequest(
        f"{field} must be a string, a list of strings, a list of token ids or a list of those; it must not be empty",
        param=field,
    )


DIALECT = Dialect("/v1/completions", "cmpl-", decode, CompletionEncoder, encode_error)

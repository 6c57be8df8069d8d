"""OpenAI's requests to the engine's: messages and prompts to plain data, fields to `SamplingParams`.

Beyond types it is `checks.py` and the engine's door that check. Pure; answers go the other way in `answers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from brlite.config.options import LimitsConfig
from brlite.engine.admission import check_limits, context_length
from brlite.engine.backend import BackendInfo
from brlite.engine.request import Request
from brlite.errors import InvalidRequest
from brlite.sampling_params import SamplingParams
from brlite.server.answers import AnswerForm
from brlite.server.checks import check_fields, check_message, check_sequences
from brlite.server.fields import not_supported
from brlite.server.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    ContentPart,
    SamplingFields,
    StreamOptions,
)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat has what the engine allows

_SAMPLING_NAMES = [field for field in SamplingFields.__struct_fields__ if field in SamplingParams.__struct_fields__]


class Prompt(msgspec.Struct, frozen=True):
    """One prompt of a request: its text if it came as text, and its token ids unless they are still to be made."""

    text: str | None
    token_ids: list[int] | None


def check_chat(body: ChatCompletionRequest, limits: LimitsConfig) -> list[dict[str, Any]]:
    """The messages as plain data for the template. Raises `InvalidRequest`."""
    check_fields(body, limits)
    check_sequences(1, body, limits)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return plain_messages(body.messages, limits)


def plain_messages(messages: list[ChatMessage], limits: LimitsConfig) -> list[dict[str, Any]]:
    """Messages as a template takes them: role and content strings, and a name where there is one."""
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    if len(messages) > limits.max_messages:
        raise InvalidRequest(
            f"messages must have at most {limits.max_messages} entries on this server, got {len(messages)}",
            param="messages",
        )
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def chat_params(body: ChatCompletionRequest, limits: LimitsConfig) -> SamplingParams:
    """The sampling parameters of a chat. `max_completion_tokens` is OpenAI's newer name of `max_tokens`."""
    if body.max_tokens not in (None, body.max_completion_tokens) and body.max_completion_tokens is not None:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens mean the same and differ; give one", param="max_completion_tokens"
        )
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _sampling_params(body, limits, max_tokens=max_tokens, logprobs=logprobs)


def completion_params(body: CompletionRequest, limits: LimitsConfig) -> SamplingParams:
    """The sampling parameters of a completion. With `echo`, `logprobs` covers the prompt, and 0 tokens may be asked."""
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and max_tokens == 0:
        max_tokens = 1  # a step must draw something; `answers.py` leaves it out
    logprobs = None if body.logprobs is False else body.logprobs
    prompt_logprobs = logprobs if body.echo else None
    return _sampling_params(body, limits, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def check_completion(body: CompletionRequest, limits: LimitsConfig) -> list[Prompt]:
    """The prompts of a completion, in order. Raises `InvalidRequest`."""
    check_fields(body, limits)
    prompts = _prompts(body.prompt, limits)
    check_sequences(len(prompts), body, limits)
    return prompts


@contextmanager
def client_field_names(body: SamplingFields) -> Iterator[None]:
    """Refusals raised inside, of the engine's names, name the client's fields instead."""
    try:
        yield
    except InvalidRequest as error:
        name = _client_names(body).get(error.param or "")
        if name is None:
            raise
        message = str(error)
        if message.startswith(f"{error.param} "):
            message = name + message.removeprefix(str(error.param))
        raise type(error)(message, param=name, code=error.code) from None


def truncate(
    prompts: list[Prompt], body: SamplingFields, params: SamplingParams, info: BackendInfo
) -> tuple[list[Prompt], list[str]]:
    """The prompts cut to `truncate_prompt_tokens`, and a line for each that was. Raises `InvalidRequest`.

    -1 leaves the room that `max_tokens` asks for, half of the context at most and by default. The end of a prompt is
    kept, its beginning with `truncation_side = "right"`. A cut prompt has no text any more.
    """
    wanted = body.truncate_prompt_tokens
    if wanted is None:
        return prompts, []
    if wanted != int(wanted) or (wanted != -1 and wanted < 1):
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or a whole number of at least 1, got {wanted}",
            param="truncate_prompt_tokens",
        )
    half = context_length(info) // 2
    room = int(wanted) if wanted != -1 else context_length(info) - min(params.max_tokens or half, half)
    kept, warnings = [], []
    for prompt in prompts:
        token_ids = prompt.token_ids or []
        if len(token_ids) > room:
            warnings.append(f"a prompt of {len(token_ids)} tokens was cut to {room} by truncate_prompt_tokens")
            prompt = Prompt(None, token_ids[:room] if body.truncation_side == "right" else token_ids[-room:])
        kept.append(prompt)
    return kept, warnings


def answer_form(body: ChatCompletionRequest | CompletionRequest, model: str, params: SamplingParams) -> AnswerForm:
    """How the answer is to be told. `model` is the name that it goes by."""
    options = body.stream_options or StreamOptions()
    has_echo = isinstance(body, CompletionRequest) and bool(body.echo)
    return AnswerForm(
        model=model,
        n=params.n,
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        skips_special_tokens=params.skip_special_tokens,
        names_are_ids=bool(body.return_tokens_as_token_ids),
        echo=has_echo,
        is_echo_only=has_echo and body.max_tokens == 0,
    )


def make_requests(
    answer_id: str, prompts: list[Prompt], params: SamplingParams, cache_salt: str | None, tenant: str
) -> list[Request]:
    """The engine's requests for prompts whose token ids are made, which share a turn of their tenant's.

    Only the first may be ended for waiting too long.
    """
    return [
        Request(
            request_id=f"{answer_id}-{index}",
            prompt=prompt.text,
            prompt_token_ids=prompt.token_ids or [],
            params=params,
            cache_salt=cache_salt or "",
            tenant=tenant,
            group=answer_id,
            is_exempt_from_queue_timeout=index > 0,
        )
        for index, prompt in enumerate(prompts)
    ]


def _client_names(body: SamplingFields) -> dict[str, str]:
    """The engine's names of fields → the client's, where they differ."""
    if not isinstance(body, ChatCompletionRequest):
        return {"prompt_logprobs": "logprobs"}
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    return names if body.max_completion_tokens is None else {**names, "max_tokens": "max_completion_tokens"}


def _prompts(prompt: str | list[str | int | list[int]], limits: LimitsConfig) -> list[Prompt]:
    """A text, a list of texts, token ids, or a list of token ids."""
    if isinstance(prompt, str):
        return [Prompt(prompt, None)]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [Prompt(None, prompt)]  # type: ignore[arg-type]  # proved by the line above
    if len(prompt) > limits.max_prompts:
        raise InvalidRequest(
            f"prompt must hold at most {limits.max_prompts} prompts on this server, got {len(prompt)}", param="prompt"
        )
    if kinds == {str}:
        return [Prompt(item, None) for item in prompt if isinstance(item, str)]
    if kinds == {list}:
        return [Prompt(None, item) for item in prompt if isinstance(item, list)]
    raise InvalidRequest(
        "prompt must be a string, a list of strings, a list of token ids or a list of those; it must not be empty",
        param="prompt",
    )


def _plain_message(message: ChatMessage, param: str) -> dict[str, Any]:
    """What a template is given of a turn. A refusal is what the assistant said; reasoning is the template's to use."""
    check_message(message, param)
    content = message.content
    if message.refusal and content:
        raise not_supported(f"{param}.refusal", " beside content")
    if content is None:
        content = message.refusal
    if content is None:
        raise InvalidRequest(f"{param}.content must be a string or a list of text parts", param=f"{param}.content")
    if isinstance(content, list):
        content = "".join(_part_text(part, f"{param}.content[{index}]") for index, part in enumerate(content))
    plain = {"role": message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and isinstance(reasoning, str):  # templates know no other form
        plain["reasoning_content"] = reasoning
    return plain


def _part_text(part: ContentPart, param: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal"):
        raise not_supported(param, f": its type is {part.type[:64]!r}, and this server takes text only")
    if text is None:
        raise InvalidRequest(f'{param} must be {{"type": "text", "text": …}}', param=param)
    return text


def _sampling_params(body: SamplingFields, limits: LimitsConfig, **more: Any) -> SamplingParams:
    given = {name: getattr(body, name) for name in _SAMPLING_NAMES}
    params = SamplingParams(**{**{name: value for name, value in given.items() if value is not None}, **more})
    check_limits(params, limits)  # the engine does so too, but it may not be loaded yet
    return params

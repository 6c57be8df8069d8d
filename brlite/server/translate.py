"""OpenAI's requests to the engine's: messages and prompts to plain data, fields to `SamplingParams`.

What goes beyond types is checked here, or at the engine's door. Pure; answers go the other way in `answers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from brlite.config import LimitsConfig
from brlite.engine.request import Request
from brlite.errors import InvalidRequest
from brlite.sampling_params import SamplingParams
from brlite.server.protocol import ChatCompletionRequest, ChatMessage, CompletionRequest, SamplingFields

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat may use what the context has

_SAMPLING_NAMES = [field for field in SamplingFields.__struct_fields__ if field in SamplingParams.__struct_fields__]
_NOT_BUILT = "is not supported by this version of brlite"

# Field → whether a value asks for nothing beyond what is built. Any other value is refused, never ignored.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "use_beam_search": lambda value: value is False,
    "response_format": lambda value: value == {"type": "text"},
    "tools": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "functions": lambda value: value == [],
    "function_call": lambda value: value in ("none", "auto"),
    "modalities": lambda value: value == ["text"],
    "suffix": lambda value: value == "",
    "chat_template_kwargs": lambda value: value == {},
}
_UNBUILT_FIELDS = (
    *("use_beam_search", "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("structured_outputs", "tools", "tool_choice", "functions", "function_call", "modalities", "audio"),
    *("chat_template", "chat_template_kwargs", "suffix"),
)


class Prompt(msgspec.Struct, frozen=True):
    """One prompt of a request: its text if it came as text, and its token ids unless they are still to be made."""

    text: str | None
    token_ids: list[int] | None


def check_chat(body: ChatCompletionRequest, limits: LimitsConfig) -> list[dict[str, Any]]:
    """The messages as plain data for the template. Raises `InvalidRequest`."""
    _refuse_unbuilt(body)
    if body.top_logprobs is not None and not body.logprobs:
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


def chat_params(body: ChatCompletionRequest) -> SamplingParams:
    """The sampling parameters of a chat. `max_completion_tokens` is OpenAI's newer name of `max_tokens`."""
    if body.max_completion_tokens is not None and body.max_tokens is not None:
        raise InvalidRequest("give max_tokens or max_completion_tokens, not both", param="max_completion_tokens")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _sampling_params(body, max_tokens=max_tokens, logprobs=logprobs)


def completion_params(body: CompletionRequest) -> SamplingParams:
    """The sampling parameters of a completion. With `echo`, `logprobs` covers the prompt, and 0 tokens may be asked."""
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and max_tokens == 0:
        max_tokens = 1  # a step must draw something; `answers.py` leaves it out
    prompt_logprobs = body.logprobs if body.echo else None
    return _sampling_params(body, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)


def check_completion(body: CompletionRequest, limits: LimitsConfig) -> list[Prompt]:
    """The prompts of a completion, in order. Raises `InvalidRequest`."""
    _refuse_unbuilt(body)
    prompts = _prompts(body.prompt)
    if len(prompts) > limits.max_prompts:
        raise InvalidRequest(
            f"prompt must hold at most {limits.max_prompts} prompts on this server, got {len(prompts)}", param="prompt"
        )
    num_sequences = len(prompts) * (body.n or 1)
    if num_sequences > limits.max_sequences:
        raise InvalidRequest(
            f"prompts times n must be at most {limits.max_sequences} on this server, got {num_sequences}", param="n"
        )
    return prompts


def make_request(request_id: str, prompt: Prompt, params: SamplingParams, cache_salt: str | None) -> Request:
    """The engine's request for a prompt whose token ids are made."""
    assert prompt.token_ids is not None
    return Request(
        request_id=request_id,
        prompt=prompt.text,
        prompt_token_ids=prompt.token_ids,
        params=params,
        cache_salt=cache_salt or "",
    )


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """A text, a list of texts, token ids, or a list of token ids."""
    if isinstance(prompt, str):
        return [Prompt(prompt, None)]
    if prompt and all(isinstance(item, int) for item in prompt):
        return [Prompt(None, prompt)]  # type: ignore[arg-type]  # proved by the line above
    if prompt and all(isinstance(item, str) for item in prompt):
        return [Prompt(item, None) for item in prompt if isinstance(item, str)]
    if prompt and all(isinstance(item, list) for item in prompt):
        return [Prompt(None, item) for item in prompt if isinstance(item, list)]
    raise InvalidRequest(
        "prompt must be a string, a list of strings, a list of token ids or a list of those; it must not be empty",
        param="prompt",
    )


def _plain_message(message: ChatMessage, param: str) -> dict[str, Any]:
    content = message.content
    if content is None:
        raise InvalidRequest(f"{param}.content must be a string or a list of text parts", param=f"{param}.content")
    if isinstance(content, list):
        content = "".join(_part_text(part, f"{param}.content[{index}]") for index, part in enumerate(content))
    plain = {"role": message.role, "content": content}
    return plain if message.name is None else {**plain, "name": message.name}


def _part_text(part: Any, param: str) -> str:
    if part.type != "text" or part.text is None:
        raise InvalidRequest(f'{param} must be {{"type": "text", "text": …}}: this server takes text only', param=param)
    return str(part.text)


def _refuse_unbuilt(body: SamplingFields) -> None:
    for name in _UNBUILT_FIELDS:
        value = getattr(body, name, None)
        if value is not None and not _HARMLESS.get(name, _never)(value):
            raise InvalidRequest(f"{name} {_NOT_BUILT}", param=name, code="unsupported_parameter")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(f"best_of other than n {_NOT_BUILT}", param="best_of", code="unsupported_parameter")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")


def _never(value: object) -> bool:
    return False


def _sampling_params(body: SamplingFields, **more: Any) -> SamplingParams:
    given = {name: getattr(body, name) for name in _SAMPLING_NAMES}
    return SamplingParams(**{**{name: value for name, value in given.items() if value is not None}, **more})

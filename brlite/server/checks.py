"""What a request may not hold: fields that are not built yet, options that would do nothing, lists without end.

Types are the decoder's to check, the sampling table's ranges `SamplingParams`'s, and the model's limits the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from brlite.config import LimitsConfig
from brlite.errors import InvalidRequest
from brlite.server.protocol import ChatMessage, SamplingFields, StreamOptions, TokenizeRequest

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
_UNBUILT_MESSAGE_FIELDS = (
    *("refusal", "tool_calls", "tool_call_id", "function_call", "audio", "annotations"),
    *("reasoning", "reasoning_content"),
)
_UNBUILT_STREAM_OPTIONS = ("include_obfuscation", "continuous_usage_stats")


def check_fields(body: SamplingFields, limits: LimitsConfig) -> None:
    """What both kinds of completion share. Raises `InvalidRequest`, as all of these do."""
    _refuse_unbuilt(body)
    if body.stream_options is not None:
        _check_stream_options(body.stream_options, is_streamed=bool(body.stream))
    _check_counts(body, limits)


def check_sequences(num_prompts: int, body: SamplingFields, limits: LimitsConfig) -> None:
    """How many sequences one request may make of its prompts."""
    num_sequences = num_prompts * (body.n or 1)
    if num_sequences > limits.max_sequences:
        raise InvalidRequest(
            f"prompts times n must be at most {limits.max_sequences} on this server, got {num_sequences}", param="n"
        )


def check_message(message: ChatMessage, param: str) -> None:
    """A turn may bring the fields of other servers' answers only if they are empty."""
    for name in _UNBUILT_MESSAGE_FIELDS:
        if getattr(message, name):
            raise _unbuilt(f"{param}.{name}")


def check_tokenize(body: TokenizeRequest) -> None:
    """There must be one thing to encode, and no option that it does not have."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.messages is not None and body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens needs prompt: the chat template writes those of messages", param="add_special_tokens"
        )
    if body.prompt is not None and body.add_generation_prompt is not None:
        raise InvalidRequest("add_generation_prompt needs messages", param="add_generation_prompt")


def check_num_tokens(num_tokens: int, max_model_len: int) -> None:
    """No prompt and no answer has more tokens to decode than the model's context."""
    if num_tokens > max_model_len:
        raise InvalidRequest(
            f"tokens must have at most {max_model_len} entries on this server, got {num_tokens}", param="tokens"
        )


def _refuse_unbuilt(body: SamplingFields) -> None:
    for name in _UNBUILT_FIELDS:
        value = getattr(body, name, None)
        if value is not None and not _HARMLESS.get(name, _never)(value):
            raise _unbuilt(name)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(f"best_of other than n {_NOT_BUILT}", param="best_of", code="unsupported_parameter")


def _check_stream_options(options: StreamOptions, *, is_streamed: bool) -> None:
    if not is_streamed:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    for name in _UNBUILT_STREAM_OPTIONS:
        if getattr(options, name):
            raise _unbuilt(f"stream_options.{name}")


def _check_counts(body: SamplingFields, limits: LimitsConfig) -> None:
    """A list that is far too long is refused before anything walks it: that would hold up the loop."""
    for name, values, limit in (
        ("stop", body.stop, limits.max_stop_strings),
        ("stop_token_ids", body.stop_token_ids, limits.max_stop_strings),
        ("stop_tokens_ids", body.stop_tokens_ids, limits.max_stop_strings),
        ("logit_bias", body.logit_bias, limits.max_logit_bias),
    ):
        if values is not None and not isinstance(values, str) and len(values) > limit:
            raise InvalidRequest(
                f"{name} must have at most {limit} entries on this server, got {len(values)}", param=name
            )


def _unbuilt(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {_NOT_BUILT}", param=param, code="unsupported_parameter")


def _never(value: object) -> bool:
    return False

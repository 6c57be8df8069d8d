"""What a request may not hold: fields that are not built yet, options that would do nothing, lists without end.

Types are the decoder's to check, the sampling table's ranges `SamplingParams`'s, and the model's limits the engine's.
"""

from __future__ import annotations

from brlite.config.options import LimitsConfig
from brlite.errors import InvalidRequest
from brlite.server.fields import not_supported
from brlite.server.protocol import ChatMessage, SamplingFields, StreamOptions, TokenizeRequest

_UNBUILT_MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "function_call", "audio")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # OpenAI's; a template may refuse some


def check_fields(body: SamplingFields, limits: LimitsConfig) -> None:
    """Check the fields that both kinds of completion share. Raises `InvalidRequest`, as all functions here do."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise not_supported("best_of", " unless it is n")
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
    """Check the role, and that fields which are not supported are empty."""
    if message.role not in ROLES:
        raise InvalidRequest(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role")
    for name in _UNBUILT_MESSAGE_FIELDS:
        if getattr(message, name):
            raise not_supported(f"{param}.{name}")


def check_tokenize(body: TokenizeRequest) -> None:
    """Exactly one of `prompt` and `messages`, and only the options that belong to it."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.messages is not None and body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens needs prompt: the chat template writes those of messages", param="add_special_tokens"
        )
    for name in ("add_generation_prompt", "continue_final_message"):
        if body.prompt is not None and getattr(body, name):
            raise InvalidRequest(f"{name} needs messages", param=name)


def generation_prompt(*, add: bool | None, continues: bool | None) -> bool:
    """Whether a chat ends with the beginning of an answer. Raises where it would stand behind an open message."""
    if continues and add:
        raise InvalidRequest(
            "continue_final_message needs add_generation_prompt to be false", param="continue_final_message"
        )
    return not continues and add is not False


def _check_stream_options(options: StreamOptions, *, is_streamed: bool) -> None:
    if options.include_obfuscation:
        raise not_supported("stream_options.include_obfuscation")
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequest(
            "continuous_usage_stats needs include_usage to be true", param="stream_options.continuous_usage_stats"
        )
    if options.include_usage and not is_streamed:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")


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

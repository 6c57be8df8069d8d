"""Anthropic's Messages API: a conversation of blocks, one answer of blocks.

Decodes a body to a `Generation`. Turns, tools and the answer are in the other `anthropic_*.py` files.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from msgspec import Raw, Struct

from brlite.chat.tools import Tool
from brlite.config.options import LimitsConfig
from brlite.dialects.anthropic_encoder import PATH, MessagesEncoder, encode_error
from brlite.dialects.anthropic_tools import MessagesTool, MessagesToolChoice, decode_messages_tools
from brlite.dialects.anthropic_turns import InputBlock, InputMessage, TurnReader
from brlite.dialects.dialect import Dialect
from brlite.dialects.fields import NOTHING_MORE, OWN_PARAMETERS
from brlite.dialects.generation import Chat, Generation, ReasoningHint
from brlite.dialects.json_body import BodyDecoder, check_num_entries, missing_field
from brlite.dialects.openai import GenerationFields, Whole, generation_fields, sampling_params, take_undecoded
from brlite.errors import InvalidRequest
from brlite.sampling_params import StructuredOutput

# The engine's field names, mapped to the client's.
FIELD_NAMES = {"prompt": "messages", "stop": "stop_sequences", "reasoning_effort": "output_config.effort"}
# Efforts that only Anthropic's models accept; other models' templates get "high".
HIGH_EFFORTS = ("xhigh", "max")
_INDEX = re.compile(r"\[(\d+|\.\.\.)\]")


class Thinking(Struct):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Whole | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: Raw


class OutputConfig(Struct):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None
    task_budget: Any = None


class MessagesRequest(GenerationFields, kw_only=True):
    messages: list[InputMessage]
    system: str | list[InputBlock] | None = None
    max_tokens: Whole | None = None
    stop_sequences: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the former name of `output_config.format`
    context_management: Any = None
    thread: Any = None  # refused unless null; clients then send the whole conversation


_DECODER = BodyDecoder(MessagesRequest)


def decode(data: bytes, limits: LimitsConfig) -> Generation:
    """Decode the body. Raises `InvalidRequest`, naming the field."""
    return _decode(data, limits, needs_length=True)


def decode_count_tokens(data: bytes, limits: LimitsConfig) -> Generation:
    """Decode a request to count tokens: the same fields, only `messages` is required. Raises `InvalidRequest`."""
    return _decode(data, limits, needs_length=False)


def _decode(data: bytes, limits: LimitsConfig, *, needs_length: bool) -> Generation:
    """The generation. Errors write list indexes as Anthropic does: `messages.0.content`."""
    try:
        body, undecoded = _DECODER.decode(data)
        if needs_length and body.max_tokens is None:
            raise missing_field("max_tokens")
        return _generation(body, undecoded, limits)
    except InvalidRequest as error:
        if error.param is None or "[" not in error.param:
            raise
        param = _INDEX.sub(r".\1", error.param)
        message = str(error).replace(error.param, param)
        raise InvalidRequest(message, param=param, code=error.code) from None


def _generation(body: MessagesRequest, undecoded: dict[str, Raw], limits: LimitsConfig) -> Generation:
    more = take_undecoded(body, undecoded, OWN_PARAMETERS) if undecoded else NOTHING_MORE
    warnings = dict.fromkeys(more.warnings)
    if not body.messages:
        raise InvalidRequest("messages: at least one message is required", param="messages")
    if body.thread is not None:
        raise InvalidRequest(
            "thread: this server holds no conversations; send all messages",
            param="thread",
            code="thread_unsupported_request",
        )
    check_num_entries("messages", len(body.messages), limits, "max_messages")
    reader = TurnReader()
    reader.read(body.system, body.messages)
    tools = decode_messages_tools(body.tools, body.tool_choice, limits)
    warnings |= reader.warnings | tools.warnings | _warnings(body)

    wanted, param = body.output_format, "output_format"
    if body.output_config is not None and body.output_config.format is not None:
        wanted, param = body.output_config.format, "output_config.format"
    structured = None if wanted is None else StructuredOutput(json_schema=bytes(wanted.schema).decode(), param=param)
    field_names, stop = {**FIELD_NAMES, **more.field_names}, body.stop_sequences or ()
    thinks = body.thinking is not None and body.thinking.type != "disabled"
    return Generation(
        prompts=(_chat(body, reader.turns, tools.tools, thinks=thinks),),
        params=sampling_params(body, limits, field_names, stop=stop, structured=structured, **more.sampling),
        field_names=field_names,
        warnings=tuple(warnings),
        tool_choice=tools.choice,
        keeps_order=True,
        shows_reasoning=thinks and body.thinking is not None and body.thinking.display != "omitted",
        **generation_fields(body),
    )


def _chat(body: MessagesRequest, turns: list[dict[str, Any]], tools: tuple[Tool, ...], *, thinks: bool) -> Chat:
    """The conversation. If it ends with an assistant's text, the answer continues that text."""
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]
    if not turns:
        raise InvalidRequest("messages: at least one message with content is required", param="messages")
    continues = turns[-1]["role"] == "assistant" and bool(turns[-1]["content"]) and "tool_calls" not in turns[-1]
    effort: str | None = body.output_config.effort if body.output_config else None
    if body.thinking is not None and not thinks:
        effort = "none"
    return Chat(
        turns,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        tools=tools,
        variables=body.chat_template_kwargs or {},
        reasoning_hint=ReasoningHint(thinks, "high" if effort in HIGH_EFFORTS else effort, "output_config.effort"),
    )


def _warnings(body: MessagesRequest) -> dict[str, None]:
    """A warning for each field that is accepted but has no effect."""
    config = body.output_config or OutputConfig()
    said = {
        "context_management is not applied: the whole conversation is read": body.context_management,
        "thinking.budget_tokens is not obeyed: max_tokens bounds reasoning and answer together": body.thinking
        and body.thinking.budget_tokens,
        f"output_config.effort {config.effort} is told to the model as high": config.effort in HIGH_EFFORTS,
        "output_config.task_budget is not obeyed": config.task_budget,
    }
    return dict.fromkeys(line for line, is_said in said.items() if is_said)


DIALECT = Dialect(PATH, "msg_", decode, MessagesEncoder, encode_error)

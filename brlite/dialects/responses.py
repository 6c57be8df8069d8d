"""OpenAI's Responses API: a conversation of items and one answer, which can be stored and continued by its id.

Decodes a body to a `Generation`. Items, tools and the answer are in the other `responses_*.py` files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from brlite.config.options import LimitsConfig
from brlite.dialects.dialect import Dialect
from brlite.dialects.fields import NOTHING_MORE, OWN_PARAMETERS, not_supported
from brlite.dialects.generation import Chat, Truncation
from brlite.dialects.json_body import BodyDecoder, missing_field
from brlite.dialects.object_fields import holds
from brlite.dialects.openai import (
    GenerationFields,
    ReasoningEffort,
    StreamOptions,
    Whole,
    generation_fields,
    sampling_params,
    take_undecoded,
)
from brlite.dialects.openai_tools import ToolChoiceObject
from brlite.dialects.responses_encoder import ID_PREFIX, ResponseGeneration, ResponsesEncoder, encode_error
from brlite.dialects.responses_items import InputItem, ItemReader, NothingStored, StoredResponses
from brlite.dialects.responses_stored import FinishedResponse
from brlite.dialects.responses_tools import ResponseTool, decode_response_tools
from brlite.errors import InvalidRequest
from brlite.files.quoting import excerpt
from brlite.sampling_params import SamplingParams, StructuredOutput

ENCRYPTED_REASONING = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"
# An answer can have only the first two. The others are results of hosted tools, which this server does not have.
INCLUDABLE = (
    *(ENCRYPTED_REASONING, LOGPROBS, "file_search_call.results", "web_search_call.results"),
    *("web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url"),
    "code_interpreter_call.outputs",
)
FORMATS = ("text", "json_object", "json_schema")
# The engine's field names, mapped to the client's.
FIELD_NAMES = {
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "reasoning_effort": "reasoning.effort",
}
NOTHING_STORED = NothingStored()


class TextFormat(Struct, forbid_unknown_fields=True):
    """The format of the answer: flat, unlike a chat's `response_format`. `schema` is enforced with or without
    `strict`."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: Raw | UnsetType = UNSET
    strict: bool | None = None


class TextConfig(Struct):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Struct):
    """Options of reasoning. The answer has the whole reasoning, never a summary."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(GenerationFields, kw_only=True):
    input: str | list[Annotated[Raw, holds(InputItem)]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Whole | None = None
    stop: str | list[str] | None = None
    top_logprobs: Whole | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[Annotated[Raw, holds(ResponseTool)]] | None = None
    tool_choice: str | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


_DECODER = BodyDecoder(ResponsesRequest)


def decode(data: bytes, limits: LimitsConfig, stored: StoredResponses = NOTHING_STORED) -> ResponseGeneration:
    """Decode the body. Raises `InvalidRequest`, naming the field."""
    body, undecoded = _DECODER.decode(data)
    if body.input is None:
        raise missing_field("input")
    return _generation(body, undecoded, limits, stored)


def decode_input_tokens(data: bytes, limits: LimitsConfig, stored: StoredResponses) -> ResponseGeneration:
    """Decode a request to count tokens: the same fields, all optional. Raises `InvalidRequest`."""
    body, undecoded = _DECODER.decode(data)
    return _generation(body, undecoded, limits, stored)


def _generation(
    body: ResponsesRequest, undecoded: dict[str, Raw], limits: LimitsConfig, stored: StoredResponses
) -> ResponseGeneration:
    more = take_undecoded(body, undecoded, OWN_PARAMETERS) if undecoded else NOTHING_MORE
    warnings, include = dict.fromkeys(more.warnings), _include(body)
    for name in ("include_obfuscation", "continuous_usage_stats"):
        if body.stream_options is not None and getattr(body.stream_options, name):
            raise not_supported(f"stream_options.{name}")
    conversation = _conversation(body, limits, stored)
    tools = decode_response_tools(body.tools, body.tool_choice, is_parallel=body.parallel_tool_calls, limits=limits)
    warnings |= conversation.warnings | dict.fromkeys(tools.warnings)
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        warnings["text.verbosity is not obeyed: no model's template here takes it"] = None
    is_stored = body.store is not False and stored.is_enabled
    if body.store and not stored.is_enabled:
        warnings["the response is not stored: limits.max_stored_bytes is 0 on this server"] = None
    if body.background and not is_stored:
        raise InvalidRequest(
            "background needs a store: store is false, or limits.max_stored_bytes is 0", param="background"
        )
    has_logprobs = bool(body.top_logprobs) or LOGPROBS in include
    field_names = {**FIELD_NAMES, **more.field_names}
    params = sampling_params(
        body,
        limits,
        field_names,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if has_logprobs else None,
        structured=_structured(body),
        **more.sampling,
    )
    chat = Chat(
        conversation.turns, tools=tools.tools, reasoning_effort=body.reasoning.effort if body.reasoning else None
    )
    return ResponseGeneration(
        prompts=(chat,),
        params=params,
        truncation=Truncation(None) if body.truncation == "auto" else None,
        field_names=field_names,
        warnings=tuple(warnings),
        tool_choice=tools.choice,
        keeps_order=True,
        items=tuple(conversation.items),
        is_stored=is_stored,
        is_background=body.background is True,
        seals_reasoning=ENCRYPTED_REASONING in include,
        tools=tools,
        shown=_shown(body, params, tools.shown, tools.shown_choice) | {"store": is_stored},
        **generation_fields(body),
    )


def _include(body: ResponsesRequest) -> list[str]:
    """What else the response is to have. Raises `InvalidRequest` for what no response has."""
    for index, name in enumerate(body.include or ()):
        if name not in INCLUDABLE:
            param = f"include[{index}]"
            raise InvalidRequest(f"{param} must be one of {', '.join(INCLUDABLE)}, got {excerpt(name)}", param=param)
    return body.include or []


def _conversation(body: ResponsesRequest, limits: LimitsConfig, stored: StoredResponses) -> ItemReader:
    """The items of earlier responses, then those of this request. The turns begin with the instructions."""
    conversation = ItemReader(stored)
    if body.previous_response_id is not None:
        before = stored.conversation(body.previous_response_id)
        if before is None:
            reason = (
                "it was never stored, was deleted, or was forgotten for newer ones"
                if stored.is_enabled
                else "this server stores no responses; send the conversation in input"
            )
            raise InvalidRequest(
                f"Previous response with id {excerpt(body.previous_response_id)} not found: {reason}.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        conversation.extend(before, "previous_response_id", limits)
    if isinstance(body.input, str):
        content = msgspec.json.encode({"type": "message", "role": "user", "content": body.input})
        conversation.extend([Raw(content)], "input", limits)
    elif body.input is not None:
        conversation.extend(body.input, "input", limits)
    turns = conversation.turns
    if body.instructions:
        if turns and turns[0]["role"] in ("system", "developer"):  # many templates take only one such message
            turns[0] = {"role": "system", "content": f"{body.instructions}\n\n{turns[0]['content']}"}
        else:
            turns.insert(0, {"role": "system", "content": body.instructions})
    if not turns:
        raise InvalidRequest("input must hold at least one message", param="input")
    return conversation


def _structured(body: ResponsesRequest) -> StructuredOutput | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None:
        return None
    if wanted.type not in FORMATS:
        raise InvalidRequest(
            f"text.format.type must be one of {', '.join(FORMATS)}, got {excerpt(wanted.type)}",
            param="text.format.type",
        )
    schema = "null" if isinstance(wanted.schema, UnsetType) else bytes(wanted.schema).decode()
    if wanted.type == "json_schema" and schema == "null":
        raise missing_field("text.format.schema")
    if wanted.type != "json_schema" and schema != "null":
        raise InvalidRequest(
            f"text.format.schema cannot be given with the type {wanted.type}", param="text.format.schema"
        )
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutput(json_object=True, param="text.format")
    return StructuredOutput(json_schema=schema, param="text.format")


def _shown(
    body: ResponsesRequest,
    params: SamplingParams,
    tools: list[dict[str, Any]],
    tool_choice: str | dict[str, Any],
) -> dict[str, Any]:
    """The fields of the request that the response echoes, with defaults filled in."""
    reasoning, text = body.reasoning or ReasoningConfig(), body.text or TextConfig()
    text_format: dict[str, Any] = {"type": "text"}
    if text.format is not None:
        given = {"type": text.format.type, "name": text.format.name, "description": text.format.description}
        text_format = {name: value for name, value in given.items() if value is not None}
        if text.format.type == "json_schema":
            text_format |= {"name": text.format.name or "", "schema": text.format.schema, "strict": True}
    return {
        "instructions": body.instructions,
        "max_output_tokens": params.max_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": params.temperature,
        "text": {"format": text_format, "verbosity": "medium"},
        "tool_choice": tool_choice,
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def shown_input_items(response: FinishedResponse) -> list[dict[str, Any]]:
    """The input items of a response, oldest first, each with the fields that its type requires."""
    items: list[dict[str, Any]] = []
    for index, raw in enumerate(response.input):
        item = msgspec.json.decode(raw)
        item.setdefault("type", "message")
        item["id"] = item.get("id") or f"{item['type']}_{response.id.removeprefix(ID_PREFIX)}in{index}"
        if item["type"] == "message":
            if isinstance(item.get("content"), str):
                is_output = item.get("role") == "assistant"
                part = {"type": "output_text", "annotations": []} if is_output else {"type": "input_text"}
                item["content"] = [{**part, "text": item["content"]}]
            item.setdefault("status", "completed")
        elif item["type"] == "reasoning":
            item.setdefault("summary", [])
        items.append(item)
    return items


DIALECT = Dialect("/v1/responses", ID_PREFIX, decode, ResponsesEncoder, encode_error)

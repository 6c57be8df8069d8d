"""Decodes Anthropic's `tools` and `tool_choice`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import Struct

from brlite.chat.tools import NO_SCHEMA, Schema, Tool, ToolChoice
from brlite.config.options import LimitsConfig
from brlite.dialects.fields import not_supported
from brlite.dialects.json_body import check_num_entries, missing_field
from brlite.dialects.openai_tools import ToolChoiceObject, ToolDefinition, ToolFields, decode_tools
from brlite.errors import InvalidRequest
from brlite.files.quoting import excerpt

# Prefixes of tool types, which end with a date. Anthropic's servers run these tools. They are optional for the model.
SERVER_TOOLS = ("web_search_", "web_fetch_", "code_execution_", "tool_search_tool_", "advisor_")
_INDEX = re.compile(r"\btools\[(\d+)\]")


class MessagesTool(Struct, kw_only=True):
    """A tool of any type. The model gets all tools, at once."""

    no_effect: ClassVar = ("cache_control", "defer_loading", "eager_input_streaming")
    left_out: ClassVar = SERVER_TOOLS

    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: Schema = msgspec.field(default_factory=lambda: NO_SCHEMA)
    input_examples: list[dict[str, Any]] | None = None
    strict: bool | None = None
    allowed_callers: list[str] | None = None


class MessagesToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesTools(Struct, frozen=True):
    tools: tuple[Tool, ...]
    choice: ToolChoice
    warnings: dict[str, None]


def decode_messages_tools(
    given: Sequence[MessagesTool] | None, choice: MessagesToolChoice | None, limits: LimitsConfig
) -> MessagesTools:
    """The tools that the model may call, and the tool choice. Raises `InvalidRequest`, naming the field."""
    check_num_entries("tools", len(given or ()), limits, "max_tools")  # counts those left out too: each gives a warning
    warnings: dict[str, None] = {}
    definitions: list[ToolDefinition] = []
    places: list[int] = []  # each definition's index in the client's list
    for index, tool in enumerate(given or ()):
        kind = tool.type or "custom"
        if kind.startswith(SERVER_TOOLS):
            warnings[f"the tool {kind[:64]} was left out: this server does not have it"] = None
        elif tool.allowed_callers and "direct" not in tool.allowed_callers:
            warnings[f"the tool {excerpt(tool.name or '')} was left out: only code may call it"] = None
        else:
            definitions.append(ToolDefinition("function", _definition(tool, f"tools.{index}")))
            places.append(index)
    if choice is not None and choice.type == "tool" and not choice.name:
        raise missing_field("tool_choice.name")
    wanted: str | ToolChoiceObject | None = None
    if choice is not None:
        wanted = "required" if choice.type == "any" else choice.type
        if choice.type == "tool":
            wanted = ToolChoiceObject(type="function", name=choice.name)
    fields = ToolFields(
        tools=definitions or (None if given is None else []),
        tool_choice=wanted,
        parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
    )
    try:
        tools, decoded = decode_tools(fields, limits, schema_field="input_schema")
    except InvalidRequest as error:
        message, param = (
            _INDEX.sub(lambda at: f"tools.{places[int(at[1])]}", text) for text in (str(error), error.param or "")
        )
        raise InvalidRequest(message, param=param, code=error.code) from None
    if choice is not None and choice.type in ("any", "tool") and not tools:
        reason = ", ".join(("a call is required, and there is no tool", *warnings))
        raise InvalidRequest(f"tool_choice: {reason}", param="tool_choice")
    return MessagesTools(() if decoded.mode == "none" else tools, decoded, warnings)


def _definition(tool: MessagesTool, param: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise not_supported(
            f"{param}.type",
            f": it is {excerpt(tool.type)}, whose schema only Anthropic's models know; describe the tool with an "
            "input_schema",
        )
    for name, is_missing in (("name", tool.name is None), ("input_schema", tool.input_schema == NO_SCHEMA)):
        if is_missing:
            raise missing_field(f"{param}.{name}")
    description = tool.description
    if tool.input_examples:
        examples = "\n".join(msgspec.json.encode(example).decode() for example in tool.input_examples)
        description = f"{description or ''}\n\nExamples of its input:\n{examples}".strip()
    return Tool(name=tool.name or "", description=description, parameters=tool.input_schema, strict=tool.strict)

"""Converts the flat tools of the Responses API to functions for the model, and the names in calls back to the client's.

The tools of a namespace get its name as a prefix. A custom tool, which takes free text, becomes a function of one
string.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from brlite.chat.tools import Tool, ToolChoice
from brlite.config.options import LimitsConfig
from brlite.dialects.fields import not_supported
from brlite.dialects.json_body import check_num_entries, decode_value, missing_field
from brlite.dialects.openai_tools import ToolChoiceObject, ToolDefinition, ToolFields, decode_tools, flat_name
from brlite.files.quoting import excerpt

# Tools that are left out. Their use is optional, so an answer without them is valid. The other hosted tools reach the
# client's own data; an answer without that would be wrong.
DROPPED_TOOLS = frozenset(
    (
        *("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"),
        *("code_interpreter", "image_generation", "local_shell", "shell", "apply_patch", "tool_search"),
    )
)
CUSTOM_PARAMETERS = msgspec.Raw(b'{"type":"object","properties":{"input":{"type":"string"}},"required":["input"]}')


class ResponseTool(Struct, kw_only=True):
    """A tool of any type. The model gets all tools, at once."""

    no_effect: ClassVar = ("defer_loading", "output_schema")
    left_out: ClassVar = tuple(DROPPED_TOOLS)

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None  # decoded, since the response shows it
    strict: bool | None = None
    format: Any = None
    tools: list[ResponseTool] | None = None


class CalledTool(Struct, frozen=True):
    """The client's name and namespace of a tool that the model called."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


class ResponseTools(Struct, frozen=True, kw_only=True):
    """The tools of a request: for the model, by the model's names, and as the response echoes them."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice(mode="none")
    called: dict[str, CalledTool] = {}
    shown: list[dict[str, Any]] = []
    shown_choice: str | dict[str, Any] = "auto"
    warnings: tuple[str, ...] = ()

    def find(self, name: str) -> CalledTool:
        """The client's tool that has this `name` for the model."""
        return self.called.get(name) or CalledTool(name)


_TOOL = msgspec.json.Decoder(ResponseTool)


def decode_response_tools(
    raw_tools: list[msgspec.Raw] | None,
    choice: str | ToolChoiceObject | None,
    *,
    is_parallel: bool | None,
    limits: LimitsConfig,
) -> ResponseTools:
    """Decode the tools and the tool choice. Raises `InvalidRequest`, naming the field."""
    check_num_entries("tools", len(raw_tools or ()), limits, "max_tools")
    definitions: list[ToolDefinition] = []
    called: dict[str, CalledTool] = {}
    shown: list[dict[str, Any]] = []
    warnings: dict[str, None] = {}
    for index, raw in enumerate(raw_tools or ()):
        tool = decode_value(raw, _TOOL, f"tools[{index}]")
        if tool.type in DROPPED_TOOLS:
            warnings[f"the tool {tool.type} was left out: this server does not have it"] = None
            continue
        shown.append(_shown(tool))
        namespace = tool.name if tool.type == "namespace" else None
        for inner in (tool.tools or ()) if namespace else (tool,):
            definition, names = _definition(inner, namespace, f"tools[{index}]")
            definitions.append(ToolDefinition("function", definition))
            called[definition.name] = names
            if inner.type == "custom" and isinstance(inner.format, dict) and inner.format.get("type") == "grammar":
                warnings[f"the grammar of the tool {names.name} is told to the model and not enforced"] = None
    fields = ToolFields(
        tools=definitions or (None if raw_tools is None else []),
        tool_choice=choice,
        parallel_tool_calls=is_parallel,
    )
    tools, decoded_choice = decode_tools(fields, limits)
    if choice not in (None, "none", "auto") and warnings and not tools:
        raise not_supported("tools", f": a call is required, and {', '.join(warnings)}")
    return ResponseTools(
        tools=() if decoded_choice.mode == "none" else tools,
        choice=decoded_choice,
        called=called,
        shown=shown,
        shown_choice=_shown_choice(choice),
        warnings=tuple(warnings),
    )


def _definition(tool: ResponseTool, namespace: str | None, param: str) -> tuple[Tool, CalledTool]:
    if tool.type not in ("function", "custom"):
        raise not_supported(f"{param}.type", f": it is {excerpt(tool.type)}; allowed: function, custom, namespace")
    if not tool.name:
        raise missing_field(f"{param}.name")
    name = flat_name(namespace, tool.name)
    if tool.type == "function":
        schema = msgspec.Raw(msgspec.json.encode(tool.parameters))
        function = Tool(name=name, description=tool.description, parameters=schema, strict=tool.strict)
        return function, CalledTool(tool.name, namespace)
    text = tool.description or ""
    if isinstance(tool.format, dict) and tool.format.get("type") == "grammar":
        syntax, definition = str(tool.format.get("syntax")), str(tool.format.get("definition"))
        text += f"\n\nThe input must follow this grammar ({syntax}):\n{definition}"
    function = Tool(name=name, description=text.strip() or None, parameters=CUSTOM_PARAMETERS)
    return function, CalledTool(tool.name, namespace, True)


def _shown(tool: ResponseTool) -> dict[str, Any]:
    """The tool as the response echoes it, with every field that its type requires."""
    if tool.type == "function":
        described = {} if tool.description is None else {"description": tool.description}
        strict, parameters = bool(tool.strict), tool.parameters
        return {"type": "function", "name": tool.name, **described, "parameters": parameters, "strict": strict}
    if tool.type == "namespace":
        inner = [_shown(each) for each in tool.tools or ()]
        return {"type": "namespace", "name": tool.name, "description": tool.description or "", "tools": inner}
    given = {"description": tool.description, "format": tool.format}
    return {
        "type": tool.type,
        "name": tool.name,
        **{name: value for name, value in given.items() if value is not None},
    }


def _shown_choice(choice: str | ToolChoiceObject | None) -> str | dict[str, Any]:
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    if choice.type == "allowed_tools" and choice.allowed is not None:
        tools = [{"type": tool.type, "name": tool.own_name} for tool in choice.allowed.tools]
        return {"type": "allowed_tools", "mode": choice.allowed.mode, "tools": tools}
    return {"type": choice.type, "name": choice.own_name}

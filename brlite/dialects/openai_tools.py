"""Tools in OpenAI's shapes: `tools`, `tool_choice`, `functions`, `function_call`, and calls in turns and answers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from brlite.chat.tools import Tool, ToolCallDelta, ToolChoice
from brlite.config.options import LimitsConfig
from brlite.dialects.fields import not_supported
from brlite.dialects.json_body import check_num_entries, decode_value
from brlite.errors import InvalidRequest
from brlite.files.quoting import excerpt

NO_TOOLS = ToolChoice(mode="none")

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")  # OpenAI allows 64 of A-Za-z0-9_-; MCP tool names have dots and slashes
_NAMES = re.compile(rf"{_NAME.pattern}(?:\n{_NAME.pattern})*")
_SCHEMA = msgspec.json.Decoder(dict[str, Any] | None)


class ToolDefinition(Struct):
    no_effect: ClassVar = ("cache_control",)

    type: str
    function: Tool | None = None


class FunctionName(Struct):
    name: str


class ChosenTool(Struct, kw_only=True):
    """A tool by its name: in `function` in a chat, flat in the Responses API. Both APIs read both shapes."""

    type: str = "function"
    function: FunctionName | None = None
    name: str | None = None
    namespace: str | None = None

    @property
    def own_name(self) -> str:
        """The client's name of the tool. "" if the choice has none."""
        return (self.function.name if self.function else self.name) or ""

    @property
    def full_name(self) -> str:
        """The tool's name for the model."""
        return flat_name(self.namespace, self.own_name) if self.own_name else ""


class AllowedTools(Struct):
    mode: Literal["auto", "required"]
    tools: list[ChosenTool]


class ToolChoiceObject(ChosenTool, kw_only=True):
    """A tool, or the allowed tools: those are in `allowed_tools` in a chat, flat in the Responses API."""

    type: str
    allowed_tools: AllowedTools | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[ChosenTool] | None = None

    @property
    def allowed(self) -> AllowedTools | None:
        if self.allowed_tools is None and self.mode is not None and self.tools is not None:
            return AllowedTools(self.mode, self.tools)
        return self.allowed_tools


def flat_name(namespace: str | None, name: str) -> str:
    """A tool's name for the model. It includes the namespace, because templates have none."""
    return f"{namespace}.{name}" if namespace else name


class CalledFunction(Struct):
    no_effect: ClassVar = ("parsed_arguments",)

    name: str
    arguments: str | dict[str, Any] | None = None


class TurnCall(Struct):
    """A call in an assistant's turn."""

    no_effect: ClassVar = ("index",)

    function: CalledFunction
    id: str | None = None
    type: str = "function"


class ToolFields(Struct, kw_only=True):
    """A chat's fields for tools. `functions` and `function_call` are OpenAI's older form."""

    tools: list[ToolDefinition] | None = None
    tool_choice: str | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Tool] | None = None
    function_call: str | FunctionName | None = None


def decode_tools(
    body: ToolFields,
    limits: LimitsConfig,
    num_body_bytes: int | None = None,
    *,
    schema_field: str = "function.parameters",
) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that the model may call, and the tool choice. Raises `InvalidRequest`, naming the field.

    If `num_body_bytes` is within the limit on tools, their size is not measured. `schema_field` is the client's name of
    a tool's schema.
    """
    if body.tools and body.functions:
        raise InvalidRequest("give either tools or functions", param="functions")
    param, definitions = "tools", _functions(body.tools or [])
    if body.functions:
        param, definitions, schema_field = "functions", body.functions, "parameters"
    check_num_entries(param, len(definitions), limits, "max_tools")
    if num_body_bytes is None or num_body_bytes > limits.max_tools_bytes:
        num_bytes = len(msgspec.json.encode(definitions)) if definitions else 0
        if num_bytes > limits.max_tools_bytes:
            raise InvalidRequest(
                f"{param} must have at most {limits.max_tools_bytes} bytes on this server (limits.max_tools_bytes), "
                f"got {num_bytes}",
                param=param,
            )
        definitions = [  # a copy of a schema does not keep the whole body in memory
            msgspec.structs.replace(tool, parameters=msgspec.Raw(tool.schema_text())) for tool in definitions
        ]
    for index, tool in enumerate(definitions):
        if not (isinstance(tool.parameters, msgspec.Raw) and bytes(tool.parameters).startswith(b"{")):
            # It is null, or decoding it raises the error.
            decode_value(msgspec.Raw(tool.schema_text()), _SCHEMA, f"{param}[{index}].{schema_field}")
    tools = {tool.name: tool for tool in definitions}
    _check_names(definitions, param)
    if len(tools) < len(definitions):
        raise InvalidRequest(f"{param} must have different names", param=param)
    choice = _choice(body, tools)
    if choice.mode == "none":  # then no template gets the schemas, which checks them
        for tool in definitions:
            tool.schema()
    return tuple(tools.values()), choice


def _functions(tools: Sequence[ToolDefinition]) -> list[Tool]:
    """The functions of tools. Raises `InvalidRequest` for a tool that is none."""
    functions = []
    for index, tool in enumerate(tools):
        if tool.type != "function":
            raise not_supported(f"tools[{index}].type", f": it is {excerpt(tool.type)}; only function is allowed")
        if tool.function is None:
            raise InvalidRequest(f"tools[{index}].function is missing", param=f"tools[{index}].function")
        functions.append(tool.function)
    return functions


def _check_names(tools: Sequence[Tool], param: str) -> None:
    names = [tool.name for tool in tools]
    lines = "\n".join(names)  # one match for all names takes a third of the time
    if names and not (lines.count("\n") == len(names) - 1 and _NAMES.fullmatch(lines)):
        index = next(index for index, name in enumerate(names) if not _NAME.fullmatch(name))
        place, allowed = f"{param}[{index}].name", "1 to 128 letters, digits and _ . : / -"
        raise InvalidRequest(f"{place} must be {allowed}, got {excerpt(names[index])}", param=place)


def _choice(body: ToolFields, names: Collection[str]) -> ToolChoice:
    """The tool choice. As in OpenAI's API, the default is "auto" with tools and "none" without. With an empty list of
    tools, any choice means "none"."""
    parallel = body.parallel_tool_calls is not False and not body.functions
    param: str = "tool_choice"
    choice: str | ToolChoiceObject | FunctionName | None = body.tool_choice
    if body.functions or choice is None:
        param, choice = "function_call", body.function_call
    if not names:
        if choice not in (None, "none", "auto") and body.tools is None and body.functions is None:
            raise InvalidRequest(f"{param} needs tools", param=param)
        return NO_TOOLS
    if choice is None or choice == "auto":
        return ToolChoice(parallel=parallel)
    if isinstance(choice, str):
        if choice == "none":
            return NO_TOOLS
        if choice == "required" and not body.functions:
            return ToolChoice(mode="required", parallel=parallel)
        raise InvalidRequest(f"{param} must be none, auto, required or an object, got {excerpt(choice)}", param=param)
    if isinstance(choice, FunctionName):
        return ToolChoice(mode="required", names=_known([choice.name], names, param), is_named=True, parallel=False)
    if choice.type in ("function", "custom") and choice.full_name:
        known = _known([choice.full_name], names, param)
        return ToolChoice(mode="required", names=known, is_named=True, parallel=False)
    if choice.type == "allowed_tools" and choice.allowed is not None:
        param = "tool_choice.tools" if choice.allowed_tools is None else "tool_choice.allowed_tools.tools"
        if not choice.allowed.tools:
            raise InvalidRequest(f"{param} is empty", param=param)
        known = _known([tool.full_name for tool in choice.allowed.tools], names, param)
        return ToolChoice(mode=choice.allowed.mode, names=known, parallel=parallel)
    raise not_supported(
        param,
        f": its type is {excerpt(choice.type)}; allowed: function or custom with a name, allowed_tools with mode "
        "and tools",
    )


def _known(wanted: Sequence[str], names: Collection[str], param: str) -> tuple[str, ...]:
    unknown = next((name for name in wanted if name not in names), None)
    if unknown is not None:
        raise InvalidRequest(f"{param}: there is no tool {excerpt(unknown)} in this request", param=param)
    return tuple(dict.fromkeys(wanted))


def turn_calls(calls: Sequence[TurnCall], param: str) -> list[dict[str, Any]]:
    """The calls of an assistant's turn in the shape that templates take. Raises `InvalidRequest`."""
    plain = []
    for index, call in enumerate(calls):
        if call.type != "function":
            raise not_supported(f"{param}[{index}].type", f": it is {excerpt(call.type)}; only function is allowed")
        function = {"name": call.function.name, "arguments": call.function.arguments or "{}"}
        plain.append({"id": call.id or f"call_{index}", "type": "function", "function": function})
    return plain


class ShownFunction(Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ShownCall(Struct, kw_only=True):
    """A call in an answer, or a piece of one in a chunk. Only chunks have an `index`."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: ShownFunction


def shown_calls(calls: Sequence[ToolCallDelta], *, has_index: bool) -> list[ShownCall]:
    """Calls, or pieces of calls, in the shape of answers."""
    return [
        ShownCall(
            index=call.index if has_index else UNSET,
            id=UNSET if call.id is None else call.id,
            type=UNSET if call.id is None else "function",
            function=shown_function(call),
        )
        for call in calls
    ]


def shown_function(call: ToolCallDelta) -> ShownFunction:
    return ShownFunction(name=UNSET if call.name is None else call.name, arguments=call.arguments)

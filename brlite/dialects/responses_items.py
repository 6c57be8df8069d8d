"""Converts the items of a Responses conversation, as clients send them, to the turns of a chat.

An assistant's reasoning, message and calls are separate items here, but one turn of a chat. The raw items are kept
too, because they are needed to continue a stored response.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from brlite.config.options import LimitsConfig
from brlite.dialects.json_body import decode_value, missing_field
from brlite.dialects.openai_chat import ContentPart, part_text
from brlite.dialects.openai_tools import flat_name
from brlite.errors import InvalidRequest
from brlite.files.quoting import excerpt

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
# Items of tools that other servers host. They are left out; the model gets only the assistant's messages.
HOSTED_ITEMS = frozenset(
    (
        *("web_search_call", "file_search_call", "computer_call", "computer_call_output"),
        *("code_interpreter_call", "image_generation_call", "local_shell_call", "local_shell_call_output"),
        *("shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output", "mcp_list_tools"),
        *("mcp_approval_request", "mcp_approval_response", "mcp_call", "tool_search_call", "tool_search_output"),
    )
)
REASONING_PREFIX = "brlite1:"  # begins each `encrypted_content` made by this server


class StoredResponses(Protocol):
    """The earlier responses that a client may continue: those made with the same API key."""

    @property
    def is_enabled(self) -> bool: ...

    def conversation(self, response_id: str) -> list[Raw] | None:
        """The input and output items of a response. None if it is not stored."""
        ...

    def item(self, item_id: str) -> Raw | None:
        """An item of a stored response. None if there is none."""
        ...


class NothingStored:
    """The `StoredResponses` of a server that stores none."""

    is_enabled = False

    def conversation(self, response_id: str) -> None:
        return None

    def item(self, item_id: str) -> None:
        return None


class ItemTag(Struct):
    type: str | None = None
    id: str | None = None
    role: Raw | UnsetType = UNSET


class InputItem(Struct, kw_only=True):
    """An item of any kind. Clients send back what an answer has."""

    no_effect: ClassVar = ("caller", "parsed_arguments", "phase", "status")
    left_out: ClassVar = tuple(HOSTED_ITEMS)

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    encrypted_content: str | None = None


_TAG = msgspec.json.Decoder(ItemTag)
_ITEM = msgspec.json.Decoder(InputItem)


class ItemReader:
    """Collects items and converts them to turns. `add` raises `InvalidRequest`, naming the item and its field."""

    def __init__(self, stored: StoredResponses) -> None:
        self.items: list[Raw] = []
        self.turns: list[dict[str, Any]] = []
        self.warnings: dict[str, None] = {}
        self._stored = stored
        self._call_ids: set[str] = set()
        self._add: dict[str, Callable[[InputItem, str], None]] = {
            "message": self._message,
            "reasoning": self._reasoning,
            "function_call": self._call,
            "custom_tool_call": self._call,
            "function_call_output": self._output,
            "custom_tool_call_output": self._output,
        }

    def extend(self, items: Sequence[Raw], name: str, limits: LimitsConfig) -> None:
        """Add the items of the field `name`."""
        if len(self.items) + len(items) > limits.max_messages:
            raise InvalidRequest(
                f"{name} and the responses before it must have at most {limits.max_messages} items on this server "
                f"(limits.max_messages), got {len(self.items) + len(items)}",
                param=name,
            )
        for index, raw in enumerate(items):
            self.add(raw, f"{name}[{index}]")

    def add(self, raw: Raw, param: str) -> None:
        tag = decode_value(raw, _TAG, param)
        if tag.type == "item_reference" or (tag.type is None and tag.id is not None and tag.role is UNSET):
            referenced = self._stored.item(tag.id or "")
            if referenced is None:
                reason = "" if self._stored.is_enabled else ": this server stores no responses"
                raise InvalidRequest(f"Item with id {excerpt(tag.id or '')} not found{reason}.", param=f"{param}.id")
            raw = referenced
            tag = decode_value(raw, _TAG, param)
        kind = tag.type or "message"
        self.items.append(raw)
        if kind in HOSTED_ITEMS:
            self.warnings[f"items of the type {kind} were left out: the model here has no such tool"] = None
            return
        add = self._add.get(kind)
        if add is None:
            raise InvalidRequest(
                f"{param}.type must be one of {', '.join((*self._add, 'item_reference'))}, got {excerpt(kind)}",
                param=f"{param}.type",
            )
        add(decode_value(raw, _ITEM, param), param)

    def _message(self, item: InputItem, param: str) -> None:
        if item.role not in ROLES:
            raise InvalidRequest(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role")
        content = "" if item.content is None and item.role == "assistant" else item.content  # as in chats
        text = _text(content, f"{param}.content")
        if item.role != "assistant":
            self.turns.append({"role": item.role, "content": text})
            return
        turn = self._assistant_turn()
        if turn["content"] or turn.get("tool_calls"):
            turn = self._new_assistant_turn()
        turn["content"] = text

    def _reasoning(self, item: InputItem, param: str) -> None:
        text = _text(item.content or "", f"{param}.content")
        if not text and (item.encrypted_content or "").startswith(REASONING_PREFIX):  # made by `sealed`
            encoded = str(item.encrypted_content).removeprefix(REASONING_PREFIX)
            with suppress(binascii.Error, UnicodeDecodeError):
                text = base64.b64decode(encoded, validate=True).decode()
        if not text:
            text = "\n\n".join(_text([part], f"{param}.summary") for part in item.summary or ())
        if not text:
            if item.encrypted_content:
                self.warnings["reasoning that another server has encrypted was left out"] = None
            return
        turn = self._assistant_turn()
        if turn["content"] or turn.get("tool_calls") or turn.get("reasoning_content"):
            turn = self._new_assistant_turn()
        turn["reasoning_content"] = text

    def _call(self, item: InputItem, param: str) -> None:
        is_custom = item.type == "custom_tool_call"
        call_id, name = _required(item.call_id, f"{param}.call_id"), _required(item.name, f"{param}.name")
        arguments = custom_arguments(item.input or "") if is_custom else item.arguments or "{}"
        self._call_ids.add(call_id)
        function = {"name": flat_name(item.namespace, name), "arguments": arguments}
        calls = self._assistant_turn().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def _output(self, item: InputItem, param: str) -> None:
        call_id = _required(item.call_id, f"{param}.call_id")
        if call_id not in self._call_ids:
            raise InvalidRequest(
                f"No tool call found for the output with call_id {excerpt(call_id)}: send the call before it, or the "
                "previous_response_id of the response that has it",
                param=f"{param}.call_id",
            )
        self.turns.append(
            {"role": "tool", "tool_call_id": call_id, "content": _text(item.output or "", f"{param}.output")}
        )

    def _assistant_turn(self) -> dict[str, Any]:
        """The last turn if it is the assistant's, else a new one."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            return self.turns[-1]
        return self._new_assistant_turn()

    def _new_assistant_turn(self) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": "assistant", "content": ""}
        self.turns.append(turn)
        return turn


def custom_arguments(text: str) -> str:
    """The free text of a custom tool's call as the JSON arguments of a function."""
    return msgspec.json.encode({"input": text}).decode()


def sealed(reasoning: str) -> str:
    """Reasoning as `encrypted_content`: base64, not encrypted, because the client may read its own conversation."""
    return REASONING_PREFIX + base64.b64encode(reasoning.encode()).decode()


def _required(value: str | None, param: str) -> str:
    if not value:
        raise missing_field(param)
    return value


def _text(content: str | Sequence[ContentPart] | None, param: str) -> str:
    if content is None:
        raise InvalidRequest(f"{param} must be a string or a list of text parts", param=param)
    if isinstance(content, str):
        return content
    return "".join([part_text(part, f"{param}[{index}]", TEXT_PARTS) for index, part in enumerate(content)])

"""Converts the messages of Anthropic's API, which are lists of blocks, to the turns of a chat.

Consecutive messages of one role become one turn, as in Anthropic's API. Each tool result becomes a separate turn before
the text of its message. Documents and search results are read if they are text. Blocks made by Anthropic's servers are
left out with a warning; images and files are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Raw, Struct, field

from brlite.dialects.fields import not_text
from brlite.dialects.json_body import decode_value, missing_field
from brlite.dialects.object_fields import holds
from brlite.errors import InvalidRequest
from brlite.files.quoting import excerpt

# Blocks that Anthropic's servers add to an answer. They are left out; the model gets only the assistant's text.
DROPPED_BLOCKS = frozenset(
    (
        *("redacted_thinking", "server_tool_use", "web_search_tool_result", "web_fetch_tool_result"),
        *("code_execution_tool_result", "bash_code_execution_tool_result"),
        *("text_editor_code_execution_tool_result", "tool_search_tool_result", "tool_reference"),
        *("mcp_tool_use", "mcp_tool_result", "advisor_tool_result"),
    )
)
# Claude Code's first system block. It is left out: its number differs in each request, which defeats prefix caching.
BILLING_HEADER = "x-anthropic-billing-header:"
TOOL_USE_PREFIX = "toolu_"


class InputBlock(Struct):
    """A block of any type."""

    no_effect: ClassVar = ("cache_control", "caller", "signature", "toolset_name")
    left_out: ClassVar = tuple(DROPPED_BLOCKS)

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Raw = field(default_factory=lambda: Raw(b"null"))
    tool_use_id: str | None = None
    content: Annotated[Raw, holds(str | list[InputBlock])] = field(default_factory=lambda: Raw(b"null"))
    is_error: bool | None = None
    source: Annotated[Raw, holds(DocumentSource)] = field(default_factory=lambda: Raw(b"null"))
    title: str | None = None
    context: str | None = None
    citations: Annotated[Raw, holds(Citations)] = field(default_factory=lambda: Raw(b"null"))


class DocumentSource(Struct):
    """The text of a document: `data` of the type text, `content` of the type content."""

    no_effect: ClassVar = ("media_type",)

    type: str
    data: str | None = None
    content: str | list[InputBlock] | None = None


class Citations(Struct):
    enabled: bool = False


class InputMessage(Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[InputBlock]


_CONTENT = msgspec.json.Decoder(str | list[InputBlock] | None)
_ADDRESS = msgspec.json.Decoder(str | None)
_SOURCE = msgspec.json.Decoder(DocumentSource)
_CITATIONS = msgspec.json.Decoder(Citations | None)


class TurnReader:
    """Reads messages in order. `read` raises `InvalidRequest`, naming the block and its field."""

    def __init__(self) -> None:
        self.turns: list[dict[str, Any]] = []
        self.warnings: dict[str, None] = {}
        self._call_ids: set[str] = set()

    def read(self, system: str | Sequence[InputBlock] | None, messages: Sequence[InputMessage]) -> None:
        """Add all turns. Leading system messages are added to the system turn, after `system`. Later ones become text
        of a user turn, inside `<system>` tags."""
        texts = [] if system is None else self._texts(system, "system")
        first = 0
        while first < len(messages) and messages[first].role == "system":
            texts += self._texts(messages[first].content, f"messages.{first}.content")
            first += 1
        texts = [text for text in texts if text and not text.startswith(BILLING_HEADER)]
        if texts:
            self.turns.append({"role": "system", "content": "\n\n".join(texts)})

        numbered = [(index, messages[index]) for index in range(first, len(messages))]
        for is_assistant, group in groupby(numbered, lambda each: each[1].role == "assistant"):
            if is_assistant:
                self._assistant([(message.content, f"messages.{index}.content") for index, message in group])
                continue
            results: list[dict[str, Any]] = []
            user_texts: list[str] = []
            for index, message in group:
                if message.role == "system":
                    text = "\n\n".join(self._texts(message.content, f"messages.{index}.content"))
                    user_texts.append(f"<system>\n{text}\n</system>")
                    self.warnings["a system message behind the first ones is told as text of the user's turn"] = None
                    continue
                param, content = f"messages.{index}.content", message.content
                for at, block in enumerate([InputBlock("text", content)] if isinstance(content, str) else content):
                    if block.type == "tool_result":
                        results.append(self._result(block, f"{param}.{at}"))
                    elif not self._is_dropped(block):
                        user_texts.append(self._text(block, f"{param}.{at}"))
            self.turns += results
            if user_texts or not results:
                self.turns.append({"role": "user", "content": "\n\n".join(user_texts)})

    def _texts(self, content: str | Sequence[InputBlock], param: str) -> list[str]:
        """The texts of content. Raises `InvalidRequest` for a block without text that is not one to leave out."""
        if isinstance(content, str):
            return [content]
        blocks = enumerate(content)
        return [self._text(block, f"{param}.{at}") for at, block in blocks if not self._is_dropped(block)]

    def _text(self, block: InputBlock, param: str) -> str:
        """The text of a block: that of a document or search result has its title, and its context or address, first."""
        if block.type not in ("document", "search_result"):
            return _plain_text(block, param)
        if block.type == "search_result":
            about, place = decode_value(block.source, _ADDRESS, f"{param}.source"), f"{param}.content"
            content = decode_value(block.content, _CONTENT, place)
        else:
            source, about = decode_value(block.source, _SOURCE, f"{param}.source"), block.context
            if source.type not in ("text", "content"):
                raise not_text(f"{param}.source", source.type)
            key, content = ("data", source.data) if source.type == "text" else ("content", source.content)
            place = f"{param}.source.{key}"
        if content is None:
            raise missing_field(place)
        if (citations := decode_value(block.citations, _CITATIONS, f"{param}.citations")) and citations.enabled:
            self.warnings["citations are not made: the answer has none"] = None
        blocks = [InputBlock("text", content)] if isinstance(content, str) else content
        texts = [_plain_text(each, f"{place}.{at}") for at, each in enumerate(blocks)]
        inner = "\n".join(filter(None, (block.title, about, *texts)))
        return f"<{block.type}>\n{inner}\n</{block.type}>"

    def _result(self, block: InputBlock, param: str) -> dict[str, Any]:
        if block.tool_use_id not in self._call_ids:
            raise InvalidRequest(
                f"{param}.tool_use_id: {excerpt(block.tool_use_id or '')} is no tool_use block of an assistant's "
                "message before it",
                param=f"{param}.tool_use_id",
            )
        content = decode_value(block.content, _CONTENT, f"{param}.content")
        text = "\n".join(self._texts(content or "", f"{param}.content"))
        if block.is_error:
            text = f"Error: {text}"
        return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}

    def _assistant(self, messages: Sequence[tuple[str | Sequence[InputBlock], str]]) -> None:
        """Add one turn for consecutive messages, given as pairs of content and field path."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for content, param in messages:
            parts = []
            for at, block in enumerate([InputBlock("text", content)] if isinstance(content, str) else content):
                if block.type == "thinking":
                    thoughts.append(block.thinking or "")
                elif block.type == "tool_use":
                    calls.append(self._call(block, f"{param}.{at}"))
                elif not self._is_dropped(block):
                    parts.append(self._text(block, f"{param}.{at}"))  # citations split a sentence into blocks
            texts.append("".join(parts))
        turn: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(filter(None, texts))}
        if any(thoughts):
            turn["reasoning_content"] = "\n\n".join(filter(None, thoughts))
        if calls:
            turn["tool_calls"] = calls
        self.turns.append(turn)

    def _call(self, block: InputBlock, param: str) -> dict[str, Any]:
        for name in ("id", "name"):
            if not getattr(block, name):
                raise missing_field(f"{param}.{name}")
        arguments = bytes(block.input).decode()
        if arguments == "null":
            arguments = "{}"
        if not arguments.startswith("{"):
            raise InvalidRequest(f"{param}.input must be an object", param=f"{param}.input")
        self._call_ids.add(str(block.id))
        return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}

    def _is_dropped(self, block: InputBlock) -> bool:
        if block.type not in DROPPED_BLOCKS:
            return False
        self.warnings[f"blocks of the type {block.type} were left out: the model here cannot read them"] = None
        return True


def _plain_text(block: InputBlock, param: str) -> str:
    if block.type != "text":
        raise not_text(param, block.type)
    if block.text is None:
        raise missing_field(f"{param}.text")
    return block.text

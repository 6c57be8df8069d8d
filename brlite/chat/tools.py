"""Tools, the tool choice, and the events of a model's reply: plain values for dialects, grammar and server."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from brlite.errors import InvalidRequest

NUM_SHORT_ID_CHARACTERS = 9  # Mistral's templates refuse other lengths
_ALPHANUMERIC = string.ascii_letters + string.digits


if TYPE_CHECKING:
    Schema = msgspec.Raw | Mapping[str, Any] | None
else:  # a client's schema stays encoded until it is needed
    Schema = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": ["object", "null"]})]
NO_SCHEMA = msgspec.Raw(b"null")


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call.

    `parameters` is a JSON schema, encoded or not; without one the function takes no arguments. With `strict` the
    arguments of every call conform to the schema.
    """

    name: str
    description: str | None = None
    parameters: Schema = msgspec.field(default_factory=lambda: NO_SCHEMA)
    strict: bool | None = None

    def schema_text(self) -> bytes:
        """The JSON text of `parameters`."""
        schema = self.parameters
        return bytes(schema) if isinstance(schema, msgspec.Raw) else msgspec.json.encode(schema)

    def schema(self) -> dict[str, Any]:
        """The decoded `parameters`. Raises `InvalidRequest` for numbers out of range and for too deep nesting."""
        try:
            decoded = msgspec.json.decode(self.schema_text(), type=dict[str, Any] | None)
        except (msgspec.MsgspecError, RecursionError) as error:
            reason = "they are nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise InvalidRequest(f"tools: the parameters of the tool {self.name}: {reason}", param="tools") from None
        return {"type": "object", "properties": {}} if decoded is None else decoded

    def for_template(self) -> dict[str, Any]:
        """The tool in the shape of OpenAI's chat API, which templates expect."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.schema()
        return {"type": "function", "function": function}


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model may or must call tools. `names` are the tools that it may call; empty: all.

    `is_named`: the client chose one function. This differs from `required` with one allowed tool in the finish reason.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()
    is_named: bool = False
    parallel: bool = True

    def allowed(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """The tools that a reply may call."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in tools if not self.names or tool.name in self.names)


class ToolCall(msgspec.Struct, frozen=True):
    """A call in a reply. `arguments` is the JSON text that the model wrote."""

    id: str
    name: str
    arguments: str


class TextDelta(msgspec.Struct, frozen=True):
    """A piece of the reply's content."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """A piece of the model's reasoning."""

    text: str


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A piece of call number `index`. The first has the id and the name; all have a piece of the arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class ToolCallEnd(msgspec.Struct, frozen=True):
    """Call number `index` is complete."""

    index: int


ReplyEvent = TextDelta | ReasoningDelta | ToolCallDelta | ToolCallEnd


class Reply(msgspec.Struct, frozen=True):
    """A whole reply: its events joined."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def collect(events: Sequence[ReplyEvent]) -> Reply:
    """Join the events of a whole reply."""
    content, reasoning = [], []
    calls: list[list[Any]] = []
    for event in events:
        if isinstance(event, TextDelta):
            content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ToolCallDelta):
            if event.id is not None:
                calls.append([event.id, event.name, []])
            calls[event.index][2].append(event.arguments)
    return Reply(
        "".join(content),
        "".join(reasoning),
        tuple(ToolCall(call_id, name, "".join(arguments)) for call_id, name, arguments in calls),
    )


def new_call_id(*, is_short: bool) -> str:
    """An id for a call: nine letters and digits, or OpenAI's `call_` and 24 hexadecimal digits."""
    if is_short:
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(NUM_SHORT_ID_CHARACTERS))
    return f"call_{secrets.token_hex(12)}"

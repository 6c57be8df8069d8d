"""The items of a response and the events of its stream, with every field that OpenAI's types require."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from brlite.dialects.openai_answer import ShownLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class DeltaTopLogprob(Struct):
    token: str
    logprob: float


class DeltaLogprobs(Struct):
    """A token's logprobs in an event. Unlike an item's they have no `bytes`."""

    token: str
    logprob: float
    top_logprobs: list[DeltaTopLogprob]


class OutputText(Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[ShownLogprob] = []


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(Struct, tag_field="type", tag="message", kw_only=True):
    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText] = []


class ReasoningItem(Struct, tag_field="type", tag="reasoning", kw_only=True):
    id: str
    summary: list[Any] = []
    content: list[ReasoningText] = []
    encrypted_content: str | UnsetType = UNSET
    status: ItemStatus


class FunctionCallItem(Struct, tag_field="type", tag="function_call", kw_only=True):
    id: str
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    arguments: str = ""
    status: ItemStatus


class CustomCallItem(Struct, tag_field="type", tag="custom_tool_call", kw_only=True):
    id: str
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    input: str = ""


Item = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem


class StreamEvent(Struct, tag_field="type", tag="", kw_only=True):
    """An event of a stream. The encoder numbers it."""

    sequence_number: int = 0


class ResponseEvent(StreamEvent, tag="response.created", kw_only=True):
    response: Raw


class InProgressEvent(ResponseEvent, tag="response.in_progress"):
    pass


class CompletedEvent(ResponseEvent, tag="response.completed"):
    pass


class IncompleteEvent(ResponseEvent, tag="response.incomplete"):
    pass


class FailedEvent(ResponseEvent, tag="response.failed"):
    pass


class ErrorEvent(StreamEvent, tag="error", kw_only=True):
    code: str | None
    message: str
    param: str | None


class ItemAdded(StreamEvent, tag="response.output_item.added", kw_only=True):
    output_index: int
    item: Item


class ItemDone(ItemAdded, tag="response.output_item.done"):
    pass


class ItemEvent(StreamEvent, tag="", kw_only=True):
    item_id: str
    output_index: int


class PartEvent(ItemEvent, tag="", kw_only=True):
    content_index: int = 0  # an item has one part


class PartAdded(PartEvent, tag="response.content_part.added", kw_only=True):
    part: OutputText | ReasoningText


class PartDone(PartAdded, tag="response.content_part.done"):
    pass


class TextDeltaEvent(PartEvent, tag="response.output_text.delta", kw_only=True):
    delta: str
    logprobs: list[DeltaLogprobs] = []


class TextDone(PartEvent, tag="response.output_text.done", kw_only=True):
    text: str
    logprobs: list[DeltaLogprobs] = []


class ReasoningDeltaEvent(PartEvent, tag="response.reasoning_text.delta", kw_only=True):
    delta: str


class ReasoningDone(PartEvent, tag="response.reasoning_text.done", kw_only=True):
    text: str


class ArgumentsDelta(ItemEvent, tag="response.function_call_arguments.delta", kw_only=True):
    delta: str


class ArgumentsDone(ItemEvent, tag="response.function_call_arguments.done", kw_only=True):
    arguments: str


class CustomInputDelta(ItemEvent, tag="response.custom_tool_call_input.delta", kw_only=True):
    delta: str


class CustomInputDone(ItemEvent, tag="response.custom_tool_call_input.done", kw_only=True):
    input: str


def delta_logprobs(logprobs: Sequence[ShownLogprob]) -> list[DeltaLogprobs]:
    """The logprobs in the shape of events."""
    return [
        DeltaLogprobs(each.token, each.logprob, [DeltaTopLogprob(top.token, top.logprob) for top in each.top_logprobs])
        for each in logprobs
    ]

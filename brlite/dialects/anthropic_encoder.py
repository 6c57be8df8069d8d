"""Encodes events as a stream of Anthropic's Messages API, or as one message. One block is open at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, field

from brlite.dialects.anthropic_turns import TOOL_USE_PREFIX
from brlite.dialects.dialect import ResponseEncoder
from brlite.dialects.errors import error_body
from brlite.dialects.event import Event, TokenUsage
from brlite.dialects.generation import Generation
from brlite.dialects.openai_answer import encode_json
from brlite.dialects.sse import frame, on_one_line
from brlite.errors import EngineError

PATH = "/v1/messages"
# Clients store it with the thinking and send both back. It is not verified here; some clients refuse an empty one.
SIGNATURE = "brlite"

DELTA_BEGIN = b"event: content_block_delta\ndata: "

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class OutputTokensDetails(Struct):
    thinking_tokens: int


class ShownUsage(Struct):
    """`input_tokens` excludes tokens read from the cache. Tokens written to the cache are not counted separately."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens_details: OutputTokensDetails | UnsetType = UNSET


class TextBlock(Struct, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: Raw = field(default_factory=lambda: Raw(b"{}"))  # JSON Schema cannot express the default of a `Raw`


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class ShownMessage(Struct, tag_field="type", tag="message", kw_only=True):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: ShownUsage
    warnings: Sequence[str] | UnsetType = UNSET


class MessageStart(Struct, tag_field="type", tag="message_start"):
    message: ShownMessage


class BlockStart(Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: ContentBlock


class TextBlockDelta(Struct, tag_field="type", tag="text_delta"):
    text: str


class InputJsonDelta(Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class ThinkingBlockDelta(Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(Struct, tag_field="type", tag="signature_delta"):
    signature: str


class BlockDelta(Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextBlockDelta | InputJsonDelta | ThinkingBlockDelta | SignatureDelta


class BlockStop(Struct, tag_field="type", tag="content_block_stop"):
    index: int


class StopDelta(Struct):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, tag_field="type", tag="message_delta", kw_only=True):
    delta: StopDelta
    usage: ShownUsage
    warnings: Sequence[str] | UnsetType = UNSET


class MessageStop(Struct, tag_field="type", tag="message_stop"):
    pass


class Ping(Struct, tag_field="type", tag="ping"):
    pass


class MessagesEncoder(ResponseEncoder):
    """Encodes the message of one call. White space between blocks does not make a text block."""

    def __init__(self, call: Generation, answer_id: str, model: str, fingerprint: str) -> None:
        self._id = answer_id
        self._model = model
        self._num_blocks = 0
        self._open: type[ContentBlock] | None = None
        self._spaces = ""  # white space that is sent if text follows
        self._has_calls = False
        self._ending: Event | None = None

    def opening(self, usage: TokenUsage) -> bytes:
        """The events that begin a stream."""
        message = ShownMessage(id=self._id, model=self._model, usage=_shown_usage(usage))
        return _frame(MessageStart(message)) + _frame(Ping())

    def encode(self, event: Event) -> bytes:
        """The stream's events for one `Event`."""
        frames: list[bytes] = []
        if event.reasoning:
            if self._open is not ThinkingBlock:
                frames += self._begin(ThinkingBlock("", ""))
            frames.append(self._delta(ThinkingBlockDelta(event.reasoning)))
        if event.text and self._open is TextBlock:
            frames.append(self._delta(TextBlockDelta(event.text)))
        elif event.text:
            self._spaces += event.text
            if not self._spaces.isspace():
                frames += self._begin_text(self._spaces)
        for piece in event.calls:
            if piece.id is not None:
                self._has_calls = True
                frames += self._begin(ToolUseBlock(_tool_use_id(piece.id), piece.name or ""))
            if piece.arguments:
                frames.append(self._delta(InputJsonDelta(piece.arguments)))
        if event.finish_reason is not None:
            self._ending = event
            if self._spaces and not self._num_blocks:  # the answer is white space only
                frames += self._begin_text(self._spaces)
            frames += self._end()
        return b"".join(frames)

    def closing(self, usage: TokenUsage) -> bytes:
        """The events that end a stream."""
        assert self._ending is not None
        if self._ending.finish_reason == "error":
            return self.failing(EngineError("the answer could not be made"))
        reason, sequence = _stop(self._ending, has_calls=self._has_calls)
        delta = MessageDelta(
            delta=StopDelta(reason, sequence), usage=_shown_usage(usage), warnings=self._ending.warnings or UNSET
        )
        return _frame(delta) + _frame(MessageStop())

    def failing(self, error: BaseException) -> bytes:
        """The event that ends a stream after an error."""
        return encode_error(error)

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        """The body of a response that is not streamed. Raises `EngineError` if the generation failed."""
        if events[-1].finish_reason == "error":
            raise EngineError("the answer could not be made")
        content, cut = _content(events)
        reason, sequence = _stop(events[-1], has_calls=any(event.calls for event in events))
        return encode_json(
            ShownMessage(
                id=self._id,
                model=self._model,
                content=content,
                stop_reason=reason,
                stop_sequence=sequence,
                usage=_shown_usage(usage),
                warnings=(*warnings, *cut) or UNSET,
            )
        )

    def _begin_text(self, text: str) -> list[bytes]:
        return [*self._begin(TextBlock("")), self._delta(TextBlockDelta(text))]

    def _begin(self, block: ContentBlock) -> list[bytes]:
        frames = self._end()
        self._open, self._spaces = type(block), ""
        return [*frames, _frame(BlockStart(self._num_blocks, block))]

    def _delta(self, delta: TextBlockDelta | InputJsonDelta | ThinkingBlockDelta | SignatureDelta) -> bytes:
        data = encode_json(BlockDelta(self._num_blocks, delta))
        return DELTA_BEGIN + (data if data.isascii() else on_one_line(data)) + b"\n\n"  # a quarter faster than `_frame`

    def _end(self) -> list[bytes]:
        """Stop the open block, if any."""
        if self._open is None:
            return []
        frames = [self._delta(SignatureDelta(SIGNATURE))] if self._open is ThinkingBlock else []
        frames.append(_frame(BlockStop(self._num_blocks)))
        self._open = None
        self._num_blocks += 1
        return frames


def encode_error(error: BaseException) -> bytes:
    """The event that ends a stream after an error."""
    return frame(error_body(error, PATH), "error")


def _frame(event: Struct) -> bytes:
    return frame(encode_json(event), str(event.__struct_config__.tag))


def _shown_usage(usage: TokenUsage) -> ShownUsage:
    return ShownUsage(
        usage.prompt - usage.cached,
        usage.completion,
        cache_read_input_tokens=usage.cached,
        output_tokens_details=OutputTokensDetails(usage.reasoning) if usage.reasoning else UNSET,
    )


def _tool_use_id(call_id: str) -> str:
    return TOOL_USE_PREFIX + call_id.removeprefix("call_")


def _stop(event: Event, *, has_calls: bool) -> tuple[StopReason, str | None]:
    """The stop reason, and the client's stop sequence that ended the answer, if one did.

    Where the length limit or a stop sequence has cut a call, it is not "tool_use".
    """
    if event.finish_reason == "length":
        return "max_tokens", None
    if isinstance(event.stop_reason, str) and event.finish_reason != "tool_calls":
        return "stop_sequence", event.stop_reason
    return ("tool_use" if has_calls else "end_turn"), None


def _content(events: Sequence[Event]) -> tuple[list[ContentBlock], list[str]]:
    """The blocks of a whole answer, the same as in a stream, and a warning for each call whose input is cut."""
    blocks: list[tuple[ContentBlock, list[str]]] = []  # each with the pieces of its text
    for event in events:
        for text, kind in ((event.reasoning, ThinkingBlock("", SIGNATURE)), (event.text, TextBlock(""))):
            if text and blocks and type(blocks[-1][0]) is type(kind):
                blocks[-1][1].append(text)
            elif text:
                blocks.append((kind, [text]))
        for piece in event.calls:
            if piece.id is not None:
                blocks.append((ToolUseBlock(_tool_use_id(piece.id), piece.name or ""), []))
            blocks[-1][1].append(piece.arguments)

    content: list[ContentBlock] = []
    warnings: list[str] = []
    for block, pieces in blocks:
        text = "".join(pieces)
        if isinstance(block, ThinkingBlock):
            block.thinking = text
        elif isinstance(block, TextBlock):
            if text.isspace() and len(blocks) > 1:
                continue
            block.text = text
        elif text:
            try:
                msgspec.json.decode(text, type=dict[str, Raw])
                block.input = Raw(text.encode())
            except (msgspec.DecodeError, RecursionError):
                warnings.append(f"the input of the call of {block.name} was cut and is left out")
        content.append(block)
    return content, warnings

"""Encodes events as a Responses stream, or as one response. One item is open at a time.

Each kind of item has a class here, which makes the stream's events of that item. A response that is not streamed has
the same items. `responses_events.py` has the shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from brlite.dialects.dialect import ResponseEncoder
from brlite.dialects.errors import SERVER_FAULT, error_code, error_message, status_of
from brlite.dialects.event import EndReason, Event, Token, TokenUsage
from brlite.dialects.generation import Generation
from brlite.dialects.kept_events import KeptEvents
from brlite.dialects.openai_answer import ShownLogprob, encode_json, shown_logprob
from brlite.dialects.responses_events import (
    ArgumentsDelta,
    ArgumentsDone,
    CompletedEvent,
    CustomCallItem,
    CustomInputDelta,
    CustomInputDone,
    ErrorEvent,
    FailedEvent,
    FunctionCallItem,
    IncompleteEvent,
    InProgressEvent,
    Item,
    ItemAdded,
    ItemDone,
    ItemStatus,
    MessageItem,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDeltaEvent,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    ResponseEvent,
    StreamEvent,
    TextDeltaEvent,
    TextDone,
    delta_logprobs,
)
from brlite.dialects.responses_items import sealed
from brlite.dialects.responses_stored import NOT_KEPT, FinishedResponse
from brlite.dialects.responses_tools import CalledTool, ResponseTools
from brlite.dialects.sse import frame

ID_PREFIX = "resp_"

# A response's status by its finish reason. A response without a finish reason has failed.
STATUSES: dict[EndReason, str] = {
    "stop": "completed",
    "tool_calls": "completed",
    "length": "incomplete",
    "abort": "incomplete",  # of a background response that its client cancels "cancelled"
    "error": "failed",
}


class ResponseGeneration(Generation, frozen=True, kw_only=True):
    """A call, the request fields that its response echoes (`shown`), and the data to store.

    `items` are the conversation so far. With `seals_reasoning`, reasoning items have `encrypted_content` and text.
    """

    items: tuple[Raw, ...] = ()
    is_stored: bool = False
    is_background: bool = False
    seals_reasoning: bool = False
    tools: ResponseTools = ResponseTools()
    shown: Mapping[str, Any] = msgspec.field(default_factory=dict)


class OpenMessage:
    def __init__(self, item_id: str, index: int, *, has_logprobs: bool) -> None:
        self._id, self._index = item_id, index
        self._texts: list[str] = []
        self._logprobs: list[ShownLogprob] = []
        self._has_logprobs = has_logprobs

    def begin(self) -> Iterator[StreamEvent]:
        yield ItemAdded(output_index=self._index, item=MessageItem(id=self._id, status="in_progress"))
        yield PartAdded(item_id=self._id, output_index=self._index, part=OutputText(""))

    def add(self, text: str, tokens: Sequence[Token] | None) -> TextDeltaEvent:
        self._texts.append(text)
        if not self._has_logprobs:
            return TextDeltaEvent(item_id=self._id, output_index=self._index, delta=text)
        logprobs = [shown_logprob(token) for token in tokens or ()]
        self._logprobs += logprobs
        return TextDeltaEvent(item_id=self._id, output_index=self._index, delta=text, logprobs=delta_logprobs(logprobs))

    def end(self, status: ItemStatus) -> tuple[list[StreamEvent], Item]:
        text = "".join(self._texts)
        part = OutputText(text, logprobs=self._logprobs)
        item = MessageItem(id=self._id, status=status, content=[part])
        done = TextDone(item_id=self._id, output_index=self._index, text=text, logprobs=delta_logprobs(self._logprobs))
        part_done = PartDone(item_id=self._id, output_index=self._index, part=part)
        return [done, part_done, ItemDone(output_index=self._index, item=item)], item


class OpenReasoning:
    def __init__(self, item_id: str, index: int, *, is_sealed: bool) -> None:
        self._id, self._index, self._is_sealed = item_id, index, is_sealed
        self._texts: list[str] = []

    def begin(self) -> Iterator[StreamEvent]:
        yield ItemAdded(output_index=self._index, item=ReasoningItem(id=self._id, status="in_progress"))
        yield PartAdded(item_id=self._id, output_index=self._index, part=ReasoningText(""))

    def add(self, text: str) -> ReasoningDeltaEvent:
        self._texts.append(text)
        return ReasoningDeltaEvent(item_id=self._id, output_index=self._index, delta=text)

    def end(self, status: ItemStatus) -> tuple[list[StreamEvent], Item]:
        text = "".join(self._texts)
        part = ReasoningText(text)
        sealed_text = sealed(text) if self._is_sealed else UNSET
        item = ReasoningItem(id=self._id, content=[part], encrypted_content=sealed_text, status=status)
        done = ReasoningDone(item_id=self._id, output_index=self._index, text=text)
        part_done = PartDone(item_id=self._id, output_index=self._index, part=part)
        return [done, part_done, ItemDone(output_index=self._index, item=item)], item


class OpenCall:
    def __init__(self, item_id: str, index: int, call_id: str, tool: CalledTool) -> None:
        self._id, self._index, self._call_id, self._tool = item_id, index, call_id, tool
        self._arguments: list[str] = []

    def begin(self) -> Iterator[StreamEvent]:
        yield ItemAdded(output_index=self._index, item=self._item("in_progress"))

    def add(self, arguments: str) -> ArgumentsDelta | None:
        self._arguments.append(arguments)
        return ArgumentsDelta(item_id=self._id, output_index=self._index, delta=arguments)

    def end(self, status: ItemStatus) -> tuple[list[StreamEvent], Item]:
        item = self._item(status)
        done = ArgumentsDone(item_id=self._id, output_index=self._index, arguments=item.arguments)
        return [done, ItemDone(output_index=self._index, item=item)], item

    def _item(self, status: ItemStatus) -> FunctionCallItem:
        return FunctionCallItem(
            id=self._id,
            call_id=self._call_id,
            name=self._tool.name,
            namespace=self._tool.namespace or UNSET,
            arguments="".join(self._arguments),
            status=status,
        )


class OpenCustomCall(OpenCall):
    """The call of a custom tool. Its text is inside JSON until the call is complete, so there is one delta, at the
    end."""

    def begin(self) -> Iterator[StreamEvent]:
        yield ItemAdded(output_index=self._index, item=self._custom_item(""))

    def add(self, arguments: str) -> None:
        self._arguments.append(arguments)

    def end(self, status: ItemStatus) -> tuple[list[StreamEvent], Item]:
        arguments = "".join(self._arguments)
        try:
            decoded = msgspec.json.decode(arguments.encode())
        except (msgspec.DecodeError, RecursionError):
            decoded = None
        text = decoded.get("input") if isinstance(decoded, dict) else None
        if not isinstance(text, str):
            text = arguments  # the JSON is cut: show it unchanged
        delta = CustomInputDelta(item_id=self._id, output_index=self._index, delta=text)
        done = CustomInputDone(item_id=self._id, output_index=self._index, input=text)
        item = self._custom_item(text)
        return [delta, done, ItemDone(output_index=self._index, item=item)], item

    def _custom_item(self, text: str) -> CustomCallItem:
        namespace = self._tool.namespace or UNSET
        return CustomCallItem(id=self._id, call_id=self._call_id, name=self._tool.name, namespace=namespace, input=text)


class ResponsesEncoder(ResponseEncoder):
    """Encodes the response of one call. If it is to be stored, `keep` gets it at the end, before the client does."""

    def __init__(
        self,
        call: Generation,
        answer_id: str,
        model: str,
        fingerprint: str,
        keep: Callable[[FinishedResponse], None] | None = None,
    ) -> None:
        assert isinstance(call, ResponseGeneration)
        self._call = call
        self._id = answer_id
        self._model = model
        self._keep = keep
        self._created = int(time.time())
        self._num_sent = 0
        self.kept = KeptEvents() if keep is not None and call.is_stored else None
        self._output: list[Item] = []
        self._open: OpenMessage | OpenReasoning | OpenCall | None = None
        self._ending: Event | None = None
        self._warnings: Sequence[str] = ()
        self._is_cancelled = False

    def begun(self) -> FinishedResponse:
        """A background response in progress, before its first event."""
        body = self._response("in_progress")
        if not self._call.is_streamed:
            self.opening(TokenUsage(0, 0, 0))
        return FinishedResponse(self._id, body, self._call.items, {}, is_background=True, is_running=True)

    def cancel(self, *, is_kept: bool) -> None:
        """Give the response the status "cancelled" if it is aborted. Unless `is_kept` it is not stored."""
        self._is_cancelled = True
        if not is_kept:
            self._keep = None

    def opening(self, usage: TokenUsage) -> bytes:
        """The events that begin a stream."""
        response = Raw(self._response("in_progress"))
        return self._frame(ResponseEvent(response=response)) + self._frame(InProgressEvent(response=response))

    def encode(self, event: Event) -> bytes:
        """The stream's events for one `Event`."""
        frames: list[bytes] = []
        if event.reasoning:
            item, begun = self._item(OpenReasoning)
            frames += begun
            frames.append(self._frame(item.add(event.reasoning)))
        if event.text:
            message, begun = self._item(OpenMessage)
            frames += begun
            frames.append(self._frame(message.add(event.text, event.tokens)))
        for piece in event.calls:
            if piece.id is not None:
                frames += self._close("completed")
                tool = self._call.tools.find(piece.name or "")
                kind, prefix = (OpenCustomCall, "ctc") if tool.is_custom else (OpenCall, "fc")
                self._open = kind(self._item_id(prefix), len(self._output), piece.id, tool)
                frames += map(self._frame, self._open.begin())
            assert isinstance(self._open, OpenCall)
            delta = self._open.add(piece.arguments) if piece.arguments else None
            if delta is not None:
                frames.append(self._frame(delta))
        if event.finish_reason is not None:
            if self._open is None and not self._output:  # an empty answer still has a message
                frames += self._item(OpenMessage)[1]
            self._ending, self._warnings = event, event.warnings
            frames += self._close("completed" if STATUSES[event.finish_reason] == "completed" else "incomplete")
        return b"".join(frames)

    def closing(self, usage: TokenUsage) -> bytes:
        """The events that end a stream."""
        return self._finished(usage)[1]

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        """The body of a response that is not streamed."""
        if self.kept is not None and not self._num_sent:
            self.opening(usage)  # a client may read a stored response as a stream
        for event in events:
            self.encode(event)
        self._warnings = warnings
        return self._finished(usage)[0]

    def failing(self, error: BaseException) -> bytes:
        """The events that end a stream after an error."""
        if not self._num_sent:
            return encode_error(error)
        frames = self._close("incomplete")
        body = self._response("failed", error=_shown_error(error))
        last = self._frame(FailedEvent(response=Raw(body)))
        self._store(body)
        return b"".join([*frames, last])

    def _item(self, kind: type[Any]) -> tuple[Any, list[bytes]]:
        """The open item, if it is of this kind, else a new one, and the events that begin it."""
        if isinstance(self._open, kind):
            return self._open, []
        frames = self._close("completed")
        if kind is OpenMessage:
            has_logprobs = self._call.params.logprobs is not None
            self._open = OpenMessage(self._item_id("msg"), len(self._output), has_logprobs=has_logprobs)
        else:
            self._open = OpenReasoning(self._item_id("rs"), len(self._output), is_sealed=self._call.seals_reasoning)
        return self._open, [*frames, *map(self._frame, self._open.begin())]

    def _close(self, status: ItemStatus) -> list[bytes]:
        if self._open is None:
            return []
        events, item = self._open.end(status)
        self._output.append(item)
        self._open = None
        return [self._frame(event) for event in events]

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id.removeprefix(ID_PREFIX)}_{len(self._output)}"

    def _frame(self, event: StreamEvent) -> bytes:
        event.sequence_number = self._num_sent
        self._num_sent += 1
        data = frame(encode_json(event), str(event.__struct_config__.tag))
        if self.kept is not None:
            self.kept.add(data)
        return data

    def _finished(self, usage: TokenUsage) -> tuple[bytes, bytes]:
        """Store the response if it is to be stored. Return its body and the event that ends its stream."""
        finish_reason = None if self._ending is None else self._ending.finish_reason
        stop_reason = None if self._ending is None else self._ending.stop_reason
        status = STATUSES[finish_reason or "error"]
        error = None
        if status == "failed":
            message = stop_reason if isinstance(stop_reason, str) else SERVER_FAULT
            error = {"code": "server_error", "message": message}
        kind = {"completed": CompletedEvent, "incomplete": IncompleteEvent}.get(status, FailedEvent)
        if finish_reason == "abort" and self._is_cancelled:
            status = "cancelled"
        body = self._response(status, usage=usage, error=error)
        last = self._frame(kind(response=Raw(body)))
        self._store(body)
        return body, last

    def _store(self, body: bytes) -> None:
        if self._keep is not None and self.kept is not None:
            output = {item.id: Raw(encode_json(item)) for item in self._output}
            kept = self.kept if self.kept.finish() else None
            self._keep(FinishedResponse(self._id, body, self._call.items, output, kept, self._call.is_background))
            self._keep = None

    def _response(self, status: str, *, usage: TokenUsage | None = None, error: dict[str, Any] | None = None) -> bytes:
        """The current state of the response object, as JSON."""
        is_over = status == "completed"
        is_cut = self._ending is not None and self._ending.finish_reason == "length"
        warnings = [*self._warnings, *([NOT_KEPT] if self.kept is not None and self.kept.is_dropped else [])]
        return encode_json(
            {
                "id": self._id,
                "object": "response",
                "created_at": self._created,
                "status": status,
                "background": self._call.is_background,
                "completed_at": int(time.time()) if is_over else None,
                "error": error,
                "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
                "model": self._model,
                "output": self._output,
                **self._call.shown,
                "temperature": self._call.params.temperature,  # may be the model's default, unknown before
                "top_p": self._call.params.top_p,
                "usage": usage
                and {
                    "input_tokens": usage.prompt,
                    "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
                    "output_tokens": usage.completion,
                    "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                    "total_tokens": usage.prompt + usage.completion,
                },
                **({"warnings": warnings} if warnings else {}),
            }
        )


def response_id_of(item_id: str) -> str:
    """The id of the response that has this item in its output."""
    return f"{ID_PREFIX}{item_id.partition('_')[2].rpartition('_')[0]}"


def encode_error(error: BaseException, sequence_number: int = 0) -> bytes:
    """The event that ends a stream after an error. `sequence_number` is that of the stream's next event."""
    event = ErrorEvent(
        sequence_number=sequence_number,
        code=error_code(error),
        message=error_message(error),
        param=getattr(error, "param", None),
    )
    return frame(encode_json(event), "error")


def _shown_error(error: BaseException) -> dict[str, Any]:
    """The error of a response. Its code is from OpenAI's closed list."""
    status = status_of(error).http
    code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(status, "server_error")
    return {"code": code, "message": error_message(error)}

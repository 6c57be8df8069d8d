"""The common part of chat and completion answers: usage, token names, logprobs, the base encoder.

Shapes are OpenAI's; `PromptLogprob` and the `token_id:` names are vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType, structs

from brlite.dialects.dialect import ResponseEncoder
from brlite.dialects.errors import error_body
from brlite.dialects.event import Event, Token, TokenText, TokenUsage
from brlite.dialects.generation import Generation
from brlite.dialects.sse import DONE_EVENT, frame, on_one_line

T = TypeVar("T")

LOWEST_LOGPROB = -9999.0  # replaces minus infinity, which JSON lacks; vLLM's value


class PromptTokensDetails(Struct):
    cached_tokens: int


class PromptUsage(Struct):
    """The usage of a request that generates no text."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerList(Struct, Generic[T], kw_only=True):
    """The answer to a request that generates no text: an item for each input."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: Sequence[T | msgspec.Raw]
    usage: PromptUsage
    warnings: Sequence[str] | UnsetType = UNSET


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # only in chats


def shown_usage(usage: TokenUsage, *, has_reasoning: bool = False) -> Usage:
    """The usage in the shape of chats and completions."""
    total = usage.prompt + usage.completion
    details = CompletionTokensDetails(usage.reasoning) if has_reasoning else UNSET
    return Usage(usage.prompt, usage.completion, total, PromptTokensDetails(usage.cached), details)


def token_name(token: TokenText, *, is_id: bool = False, taken: Collection[str] = ()) -> str:
    r"""A token's name: its text, or `bytes:\xf0\x9f` for a part of a character, as in OpenAI's API.

    With `is_id` it is `token_id:5`, as in vLLM for `return_tokens_as_token_ids`. Else the first of text, bytes and id
    that is not in `taken`, because two tokens of a vocabulary may have the same bytes.
    """
    if not is_id:
        if token.text not in taken and token.text.encode() == token.data:
            return token.text
        name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)
        if name not in taken:
            return name
    return f"token_id:{token.token_id}"


class ShownAlternative(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ShownLogprob(Struct):
    """A token of an answer in the shape of chats and Responses."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ShownAlternative]


def shown_logprob(token: Token, *, names_are_ids: bool = False) -> ShownLogprob:
    """The token with its alternatives. `bytes` has the exact bytes, also for a part of a character."""
    return ShownLogprob(
        token=token_name(token.token, is_id=names_are_ids),
        logprob=max(token.logprob or 0.0, LOWEST_LOGPROB),
        bytes=list(token.token.data),
        top_logprobs=[
            ShownAlternative(token_name(other, is_id=names_are_ids), max(logprob, LOWEST_LOGPROB), list(other.data))
            for other, logprob in token.top
        ],
    )


class PromptLogprob(Struct):
    """vLLM's shape. `rank` is null for a token that is not among the alternatives."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


def shown_prompt_logprobs(tokens: Sequence[Token | None]) -> PromptLogprobs:
    """For each token of a prompt: its logprob and those of its alternatives, by token id. Null for the first token."""
    shown: PromptLogprobs = []
    for token in tokens:
        if token is None:
            shown.append(None)
            continue
        top = {
            other.token_id: PromptLogprob(max(logprob, LOWEST_LOGPROB), rank, other.text)
            for rank, (other, logprob) in enumerate(token.top, 1)
        }
        own = PromptLogprob(max(token.logprob or 0.0, LOWEST_LOGPROB), None, token.token.text)
        token_id = token.token.token_id
        shown.append({token_id: top.get(token_id, own), **top})
    return shown


class OpenAIEncoder(ResponseEncoder):
    """The base of both encoders. `model` is the model name in the answer, `fingerprint` the backend's or empty."""

    _empty_text: bytes  # an empty text field in a chunk. It cannot occur inside a JSON string: quotes are escaped there
    _has_reasoning: bool  # whether the usage counts the tokens of reasoning

    def __init__(self, call: Generation, answer_id: str, model: str, fingerprint: str) -> None:
        self._call = call
        # The fields that chunks and whole answers have in common.
        self._common: dict[str, Any] = {
            "id": answer_id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{fingerprint}" if fingerprint else UNSET,
        }
        # The usage field of all chunks but the last, which has only the usage.
        self._no_usage: UnsetType | None = None if call.include_usage else UNSET
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # by choice: the bytes before and after a chunk's text

    def encode(self, event: Event) -> bytes:
        """The chunk of an event in a stream. A choice's last event gives two chunks if it also has output."""
        # Most events have only text. Then only the text is encoded: under 1 µs; a whole chunk takes 2.5 µs.
        # A comparison with `Event(choice=…, text=…)` would take three times as long as this one of each field.
        if (
            event.finish_reason is None
            and event.tokens is None
            and event.usage is None
            and not (event.reasoning or event.calls or event.warnings)
            and event.stop_reason is None
            and event.token_ids is None
            and event.prompt_token_ids is None
            and event.prompt_tokens is None
        ):
            return self.encode_text(event.text, event.choice)
        if event.finish_reason is not None and (event.text or event.reasoning or event.calls or event.tokens):
            return self._encode_end(event)
        return self._chunk_of(event)

    def encode_text(self, text: str, choice: int = 0) -> bytes:
        """The chunk of an event that has only this text."""
        parts = self._frames.get(choice)
        if parts is None:
            head, name, tail = self._chunk_of(Event(choice=choice, text="")).partition(self._empty_text)
            parts = self._frames[choice] = head + name[:-2], tail
        encoded = encode_json(text)
        return parts[0] + (encoded if encoded.isascii() else on_one_line(encoded)) + parts[1]

    def _chunk_of(self, event: Event) -> bytes:
        """The event as one chunk."""
        raise NotImplementedError

    def _chunk(self, choices: list[Any], usage: Usage | UnsetType | None) -> bytes:
        """A framed chunk."""
        raise NotImplementedError

    def _encode_end(self, event: Event) -> bytes:
        """A choice's last event as two chunks: its output, then the finish reason."""
        output = structs.replace(event, finish_reason=None, stop_reason=None, warnings=())
        end = Event(
            choice=event.choice,
            text="",
            tokens=None if event.tokens is None else [],
            token_ids=None if event.token_ids is None else [],
            finish_reason=event.finish_reason,
            stop_reason=event.stop_reason,
            usage=event.usage,
            warnings=event.warnings,
        )
        return self.encode(output) + self.encode(end)

    def closing(self, usage: TokenUsage) -> bytes:
        """The end of a stream: the usage, if the client wants it, and `[DONE]`."""
        if not self._call.include_usage:
            return DONE_EVENT
        return self._chunk([], shown_usage(usage, has_reasoning=self._has_reasoning)) + DONE_EVENT

    def failing(self, error: BaseException) -> bytes:
        """The events that end a stream after an error."""
        return encode_error(error)


def encode_error(error: BaseException) -> bytes:
    """The events that end a stream after an error."""
    return frame(error_body(error)) + DONE_EVENT


encode_json = msgspec.json.Encoder().encode

"""What a client gets, in no dialect: frozen values, made of the engine's outputs (`server/event_builder.py`).

`encode` of each dialect turns an `Event` into bytes.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from brlite.chat.tools import ToolCallDelta
from brlite.sampling_params import FinishReason

EndReason = FinishReason | Literal["tool_calls"]


class TokenText(Struct, frozen=True):
    """A token as text and as bytes, which differ where it is a part of a character."""

    token_id: int
    text: str
    data: bytes


class Token(Struct, frozen=True):
    """A token that is told. `offset` is where its text begins, in characters of the whole text of its choice.

    `logprob` is None for the first token of an echoed prompt, and then there are no alternatives. `top` holds the most
    probable tokens, best first.
    """

    token: TokenText
    offset: int
    logprob: float | None
    top: tuple[tuple[TokenText, float], ...] = ()


class TokenUsage(Struct, frozen=True):
    """Tokens that a call has used so far. `cached` ones are a part of the `prompt`, `reasoning` of the `completion`."""

    prompt: int
    completion: int
    cached: int
    reasoning: int = 0


class Event(Struct, frozen=True, kw_only=True):
    """What is new in one choice of an answer; in an answer that is not streamed, the whole choice.

    `calls` are pieces of calls of tools; whole ones in an answer that is not streamed. `tokens` is None where no
    logprobs were asked for. `token_ids` are what was drawn since the choice's last event, if they are to be told. The
    first event of a choice has the prompt's, and the `prompt_tokens`, whose first is None. `usage` and
    `warnings` stand in the events that are to say them.
    """

    choice: int
    text: str
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()
    tokens: list[Token] | None = None
    finish_reason: EndReason | None = None
    stop_reason: str | int | None = None
    usage: TokenUsage | None = None
    warnings: tuple[str, ...] = ()
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_tokens: list[Token | None] | None = None

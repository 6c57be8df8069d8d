"""Results for a client, independent of dialects: frozen values, built from the engine's outputs
(`server/event_builder.py`).

Each dialect's encoder turns an `Event` into bytes.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from brlite.chat.tools import ToolCallDelta
from brlite.sampling_params import FinishReason

EndReason = FinishReason | Literal["tool_calls"]


class TokenText(Struct, frozen=True):
    """A token as text and as bytes. They differ if the token is only a part of a character."""

    token_id: int
    text: str
    data: bytes


class Token(Struct, frozen=True):
    """A reported token. `offset` is where its text begins, in characters from the start of its choice's text.

    `logprob` is None for the first token of an echoed prompt, and then there are no alternatives. `top` holds the most
    probable tokens, best first.
    """

    token: TokenText
    offset: int
    logprob: float | None
    top: tuple[tuple[TokenText, float], ...] = ()


class TokenUsage(Struct, frozen=True):
    """Tokens that a call has used so far. `prompt` includes `cached`; `completion` includes `reasoning`."""

    prompt: int
    completion: int
    cached: int
    reasoning: int = 0


class Event(Struct, frozen=True, kw_only=True):
    """New output of one choice of an answer. If the answer is not streamed, the whole choice.

    `calls` are pieces of tool calls; whole calls if the answer is not streamed. `tokens` is None if the request has no
    logprobs. `token_ids` are the ids drawn since the choice's last event, if the client wants them. The first event of
    a choice also has the prompt's ids, and `prompt_tokens`, whose first entry is None. `usage` and `warnings` are set
    only in the events that report them.
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

"""Logprobs in OpenAI's two shapes: a list of objects for chats, parallel lists for completions.

The logarithm of 0, which JSON cannot hold, is told as -9999.0 in both, as by vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

from brlite.outputs import TokenLogprob
from brlite.server.protocol import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs
from brlite.tokenizer import Tokenizer

LOWEST = -9999.0


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None, tokenizer: Tokenizer) -> ChatLogprobs | None:
    """None if none were asked for. `bytes` tells the parts of a split character, which `token` cannot."""
    if logprobs is None:
        return None
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token=tokenizer.token_text(entry.token_id),
                logprob=max(entry.logprob, LOWEST),
                bytes=list(tokenizer.token_bytes(entry.token_id)),
                top_logprobs=[
                    ChatTopLogprob(
                        tokenizer.token_text(token_id), max(logprob, LOWEST), list(tokenizer.token_bytes(token_id))
                    )
                    for token_id, logprob in entry.top
                ],
            )
            for entry in logprobs
        ]
    )


def completion_logprobs(
    prompt_token_ids: Sequence[int],
    prompt_logprobs: Sequence[TokenLogprob | None] | None,
    logprobs: Sequence[TokenLogprob] | None,
    tokenizer: Tokenizer,
    offset: int,
) -> CompletionLogprobs | None:
    """The echoed prompt's entries and the completion's; None if none were asked for.

    The first prompt token has no logprob. `offset` is where in the choice's text these tokens begin, in characters.
    """
    if logprobs is None:
        return None
    echoed = (prompt_logprobs or ()) if prompt_token_ids else ()
    entries: list[TokenLogprob | None] = [*echoed, *logprobs]
    token_ids = [*prompt_token_ids, *(entry.token_id for entry in logprobs)]
    tokens = [tokenizer.token_text(token_id) for token_id in token_ids]
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return CompletionLogprobs(
        text_offset=offsets if tokens else [],
        token_logprobs=[None if entry is None else max(entry.logprob, LOWEST) for entry in entries],
        tokens=tokens,
        top_logprobs=[_alternatives(entry, tokenizer) for entry in entries],
    )


def _alternatives(entry: TokenLogprob | None, tokenizer: Tokenizer) -> dict[str, float] | None:
    """The best tokens by text, and the one that stands there even if it is not among them."""
    if entry is None:
        return None
    best = {tokenizer.token_text(token_id): max(logprob, LOWEST) for token_id, logprob in reversed(entry.top)}
    return {tokenizer.token_text(entry.token_id): max(entry.logprob, LOWEST), **best}

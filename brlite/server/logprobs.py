"""Logprobs in OpenAI's two shapes: a list of objects for chats, parallel lists for completions.

The logarithm of 0, which JSON cannot hold, is told as -9999.0 in both, as by vLLM. Offsets count characters of the text
as it is sent, and no token behind its end is told: a token waits here until its text has gone out.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import NamedTuple

from brlite.outputs import CompletionOutput, TokenLogprob
from brlite.server.protocol import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs
from brlite.tokenizer import Tokenizer

LOWEST = -9999.0


class TokenNames:
    """What tokens are called in answers: their text, or `bytes:\\xf0\\x9f` for a part of a character, as by OpenAI.

    With `are_ids` it is `token_id:5`, as by vLLM for `return_tokens_as_token_ids`.
    """

    def __init__(self, tokenizer: Tokenizer, *, are_ids: bool = False) -> None:
        self.tokenizer = tokenizer
        self._are_ids = are_ids

    def __call__(self, token_id: int, taken: Collection[str] = ()) -> str:
        """A name that is not among those `taken`: two tokens of a vocabulary may have the same bytes."""
        if not self._are_ids:
            data, text = self.tokenizer.token_bytes(token_id), self.tokenizer.token_text(token_id)
            if text.encode() == data and text not in taken:
                return text
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            if name not in taken:
                return name
        return f"token_id:{token_id}"


class ToldToken(NamedTuple):
    """A token that an answer tells, and where its text begins, in characters."""

    entry: TokenLogprob
    offset: int


class OffsetCounter:
    """Where each token begins in the text of all: `start` is the first one's place."""

    def __init__(self, start: int = 0) -> None:
        self._end = start  # of the whole characters
        self._partial = b""

    def add(self, data: bytes) -> int:
        """Where the next token, of these bytes, begins. Parts of one character begin where it does."""
        begun = self._partial + data[:1]
        text, _ = codecs.utf_8_decode(begun, "replace", False)
        is_given_up = bool(self._partial and text) and text.encode() != begun  # the part before became a U+FFFD
        offset = self._end + is_given_up
        data = self._partial + data
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._partial = data[num_used:]
        self._end += len(text)
        return offset


class TokenTrack:
    """One choice's tokens on their way out. `start` is where its text begins, behind an echoed prompt."""

    def __init__(self, tokenizer: Tokenizer, skipped_token_ids: Collection[int], start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._skipped_token_ids = skipped_token_ids
        self._counter = OffsetCounter(start)
        self._num_sent = start
        self._waiting: list[ToldToken] = []

    def take(self, completion: CompletionOutput) -> list[ToldToken]:
        """The tokens to tell with this delta. Of one that ends with a stop string, those behind the cut are dropped."""
        for entry in completion.logprobs or ():
            is_skipped = entry.token_id in self._skipped_token_ids
            data = b"" if is_skipped else self._tokenizer.token_bytes(entry.token_id)
            self._waiting.append(ToldToken(entry, self._counter.add(data)))
        self._num_sent += len(completion.text)
        if completion.finish_reason is not None and not isinstance(completion.stop_reason, str):
            num_told = len(self._waiting)
        else:
            num_told = sum(token.offset < self._num_sent for token in self._waiting)  # offsets never fall
        told, self._waiting = self._waiting[:num_told], self._waiting[num_told:]
        return told


def prompt_offsets(text: str | None, token_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Where each token of an echoed prompt begins. `text` is what the client sent; None if it sent token ids.

    Tokens that the tokenizer added (BOS, the space before the first word) take no room in the text.
    """
    if text is None:
        counter = OffsetCounter()
        offsets = [counter.add(tokenizer.token_bytes(token_id)) for token_id in token_ids]
        whole = tokenizer.decode(token_ids, skip_special_tokens=False)
        num_stripped = counter.add(b"") - len(whole) if not whole.endswith("�") else 0
        return [max(0, offset - max(0, num_stripped)) for offset in offsets]
    data, at, num_characters, offsets = text.encode(), 0, 0, []
    for token_id in token_ids:
        is_inside = at < len(data) and _continues(data[at])
        offsets.append(num_characters - is_inside)
        part = tokenizer.token_bytes(token_id)
        if data.startswith(part, at):
            length = len(part)
        elif part[:1] == b" " and data.startswith(part[1:], at):
            length = len(part) - 1
        elif token_id in tokenizer.special_token_ids:
            length = 0
        else:  # a normalizer has rewritten the text
            length = min(len(part), len(data) - at)
        num_characters += sum(not _continues(byte) for byte in data[at : at + length])
        at += length
    return offsets


def chat_logprobs(told: Sequence[ToldToken], names: TokenNames) -> ChatLogprobs:
    """`bytes` tells the parts of a split character. The chosen token has one value wherever it stands."""
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token=names(entry.token_id),
                logprob=max(entry.logprob, LOWEST),
                bytes=list(names.tokenizer.token_bytes(entry.token_id)),
                top_logprobs=[
                    ChatTopLogprob(
                        names(token_id),
                        max(entry.logprob if token_id == entry.token_id else logprob, LOWEST),
                        list(names.tokenizer.token_bytes(token_id)),
                    )
                    for token_id, logprob in entry.top
                ],
            )
            for entry, _ in told
        ]
    )


class EchoedPrompt(NamedTuple):
    """A prompt as an answer tells it. Its first token has no logprob."""

    token_ids: Sequence[int]
    offsets: Sequence[int]
    logprobs: Sequence[TokenLogprob | None]


NOT_ECHOED = EchoedPrompt((), (), ())


def completion_logprobs(
    told: Sequence[ToldToken], names: TokenNames, prompt: EchoedPrompt = NOT_ECHOED
) -> CompletionLogprobs:
    """The echoed prompt's entries and the completion's."""
    entries: list[TokenLogprob | None] = [*prompt.logprobs, *(entry for entry, _ in told)]
    return CompletionLogprobs(
        text_offset=[*prompt.offsets, *(offset for _, offset in told)],
        token_logprobs=[None if entry is None else max(entry.logprob, LOWEST) for entry in entries],
        tokens=[names(token_id) for token_id in (*prompt.token_ids, *(entry.token_id for entry, _ in told))],
        top_logprobs=[_alternatives(entry, names) for entry in entries],
    )


def _alternatives(entry: TokenLogprob | None, names: TokenNames) -> dict[str, float] | None:
    """The token that stands there, and the best ones, each under a name of its own."""
    if entry is None:
        return None
    named = {names(entry.token_id): max(entry.logprob, LOWEST)}
    for token_id, logprob in entry.top:
        if token_id != entry.token_id:
            named[names(token_id, named)] = max(logprob, LOWEST)
    return named


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is not a character's first."""
    return byte & 0xC0 == 0x80

"""The toy engine's tokenizer: a token for each byte, and four control tokens for roles and the end.

A prompt for completions is wrapped like a chat of one message, so that both get the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from brlite.chat.control_tokens import MarkedText
from brlite.chat.formats import ChatFormat
from brlite.chat.turns import NO_EXTRAS, TemplateExtras, prepare_turns
from brlite.errors import InvalidRequest
from brlite.tokenizer import Tokenizer
from brlite.tokenizer.token_bytes import TokenBytes
from brlite.tokenizer.tokenizer import Encoder, SpecialTokenIds

END, SYSTEM, USER, ASSISTANT = range(256, 260)
NAMES = {END: "<|end|>", SYSTEM: "<|system|>", USER: "<|user|>", ASSISTANT: "<|assistant|>"}
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
VOCAB_SIZE = 256 + len(NAMES)


def toy_tokenizer() -> Tokenizer:
    """A tokenizer without files, of UTF-8 bytes."""
    table = tuple(bytes([byte]) for byte in range(256)) + tuple(name.encode() for name in NAMES.values())
    return Tokenizer(
        ByteEncoder(),
        TokenBytes(table, strips_first_space=False),
        SpecialTokenIds(None, (END,), NAMES),
        ToyChat(),
    )


class ByteEncoder(Encoder):
    """One token for each byte.

    With special tokens, the text becomes a user's message, and the token that begins the answer follows it.
    """

    max_composed = 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        token_ids = list(text.encode())
        return [USER, *token_ids, ASSISTANT] if add_special_tokens else token_ids

    def encode_words(self, text: str, *, is_first: bool) -> list[int]:
        return list(text.encode())


class ToyChat(ChatFormat):
    """Each message follows the token of its role; an assistant's ends with the end token."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, extras: TemplateExtras = NO_EXTRAS
    ) -> MarkedText:
        parts: list[str | int] = []
        for message in prepare_turns(messages, extras, self.capabilities):
            role, content = message.get("role"), message.get("content") or ""
            if role not in ROLES or not isinstance(content, str):
                allowed = f"roles are {', '.join(ROLES)}, and a content is a string"
                raise InvalidRequest(f"Error in applying chat template from request: {allowed}", param="messages")
            parts += [ROLES[role], content, *([END] if role == "assistant" else [])]
        return MarkedText([*parts, *([ASSISTANT] if add_generation_prompt else [])], NAMES)

"""What cuts text into token ids: the interface, and Hugging Face's `tokenizers` behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tokenizers

_MAX_COMPOSED = 4  # so many characters at most become one where Unicode is normalised


class Encoder(Protocol):
    """Any thread may use it, and `encode` drops the GIL."""

    @property
    def max_composed(self) -> int:
        """So many characters of a text at most become one before it is cut; 0 if there is no limit."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class BackendEncoder:
    """An `Encoder` over a tokenizer of the `tokenizers` package."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    @property
    def max_composed(self) -> int:
        if any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values()):
            return 0  # such a token swallows all the white space beside it
        return 1 if self._backend.normalizer is None else _MAX_COMPOSED

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

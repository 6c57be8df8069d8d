"""Splits text into the pieces of a bare `tokenizer.model` as sentencepiece does, with one space before the text.

The `tokenizers` package adds a space after each added token, too. So added tokens are found here, and the text between
them is given to that package. Reads no files.
"""

from __future__ import annotations

import tokenizers

from brlite.chat.control_tokens import ControlToken, ControlTokens, is_control
from brlite.tokenizer.tokenizer import Encoder

_SPACE = "▁"


class PieceEncoder(Encoder):
    """An `Encoder` for a tokenizer of `build_backend`. Its added tokens are control tokens or words."""

    max_composed = 0  # tokens may absorb white space

    def __init__(self, backend: tokenizers.Tokenizer, *, add_space_prefix: bool) -> None:
        added = backend.get_added_tokens_decoder()
        tokens = {
            token.content: ControlToken(token_id, token.lstrip, token.rstrip, token.single_word)
            for token_id, token in added.items()
        }
        is_word = {token.content: not is_control(token) for token in added.values()}
        self._controls = ControlTokens({text: token for text, token in tokens.items() if not is_word[text]})
        self._words = ControlTokens({text: token for text, token in tokens.items() if is_word[text]})
        self._pieces = tokenizers.Tokenizer(backend.model)  # for text that has `▁` in place of spaces
        self._prefix = _SPACE if add_space_prefix else ""
        # The ids before and after a text that is encoded with special tokens.
        whole, bare = (backend.encode("a", add_special_tokens=added).ids for added in (True, False))
        start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
        self._before, self._after = whole[:start], whole[start + len(bare) :]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._controls.split(text)):
            ids += [part] if isinstance(part, int) else self.encode_words(part, is_first=index == 0)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def encode_words(self, text: str, *, is_first: bool) -> list[int]:
        prefix = self._prefix if is_first and text else ""
        ids: list[int] = []
        for part in self._words.split(prefix + text.replace(" ", _SPACE)):
            ids += [part] if isinstance(part, int) else self._pieces.encode(part, add_special_tokens=False).ids
        return ids

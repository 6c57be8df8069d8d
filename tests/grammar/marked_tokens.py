"""A byte vocabulary in which the marks of calls and reasoning are special tokens, as in many models."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fakes import VOCAB_SIZE, ByteTokenizer


class MarkedTokens(ByteTokenizer):
    """A byte a token, the control tokens of `ByteTokenizer`, and these marks."""

    def __init__(self, marks: Sequence[str]) -> None:
        super().__init__()
        self._marks = list(marks)
        self.vocab_size = VOCAB_SIZE + len(marks)
        self.special_token_ids = frozenset(range(256, self.vocab_size))

    def token_bytes(self, token_id: int) -> bytes:
        return self._marks[token_id - VOCAB_SIZE].encode() if token_id >= VOCAB_SIZE else super().token_bytes(token_id)

    def encode_marked(self, text: str) -> list[int]:
        """The tokens of a text in which marks are tokens."""
        ids: list[int] = []
        while text:
            mark = max((mark for mark in self._marks if text.startswith(mark)), key=len, default="")
            ids += [VOCAB_SIZE + self._marks.index(mark)] if mark else list(text[0].encode())
            text = text[len(mark) or 1 :]
        return ids

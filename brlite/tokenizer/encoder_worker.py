"""Encodes texts with a third party's tokenizer. Runs in a child process (`process/sandbox_child.py`).

Imports `tokenizers` or `sentencepiece` and the standard library, never brlite.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import import_module
from typing import Any


def create(
    tokenizers: Sequence[str] = (), sentencepiece: str | None = None
) -> TokenizersEncoder | SentencePieceProcessor:
    """An encoder from tokenizers in JSON, or from a sentencepiece model in base64."""
    return TokenizersEncoder(tokenizers) if sentencepiece is None else SentencePieceProcessor(sentencepiece)


class TokenizersEncoder:
    """Tokenizers of the `tokenizers` package, by index."""

    def __init__(self, tokenizers: Sequence[str]) -> None:
        self._tokenizers = [import_module("tokenizers").Tokenizer.from_str(text) for text in tokenizers]

    def describe(self) -> dict[str, Any]:
        return {}

    def answer(self, index: int, text: str, *, add_special_tokens: bool) -> dict[str, Any]:
        return {"ids": self._tokenizers[index].encode(text, add_special_tokens=add_special_tokens).ids}


class SentencePieceProcessor:
    """One sentencepiece model."""

    def __init__(self, sentencepiece: str) -> None:
        processor = import_module("sentencepiece").SentencePieceProcessor
        self._processor = processor(model_proto=base64.b64decode(sentencepiece))

    def describe(self) -> dict[str, Any]:
        return {
            "num_pieces": self._processor.get_piece_size(),
            "eos_token_id": self._processor.eos_id(),
            "starts_with_space": "".join(self._processor.encode("a", out_type=str)).startswith("▁"),
        }

    def answer(self, text: str) -> dict[str, Any]:
        return {"ids": self._processor.encode(text)}

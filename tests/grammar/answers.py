"""Writes answers to a grammar as a model that knows nothing would: random logits under the grammar's masks."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from brlite.grammar.matcher import Grammar
from tests.fakes import EOS, ByteTokenizer

# Beside single bytes: tokens that cross what a grammar keeps apart, as those of real vocabularies do.
LONGER = """
{" ":" ": ":{ "," "} "}, "] ]} }} }, [{ [" [[ ,{ ,[ "" {} [] true false null :true :false 10 123 00 .5 1. -1 e5 ab abc
the \\n \\" \\u00 é ä 中 "a b" -- :: 2020 -01 T00 Z" .com @a
"""
TOKENS = ["  ", " {", '": "', '", "', "\n", "\n  ", "\t", *LONGER.split()]
CLOSING = '"}],'  # are likelier, so that answers come to an end


class LongTokens(ByteTokenizer):
    """A byte a token, the control tokens of `ByteTokenizer`, and some longer tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._longer = [text.encode() for text in dict.fromkeys(TOKENS)]
        self.vocab_size = 260 + len(self._longer)

    def token_bytes(self, token_id: int) -> bytes:
        return self._longer[token_id - 260] if token_id >= 260 else super().token_bytes(token_id)

    def encode_continuation(self, text: str) -> list[int]:
        data, ids = text.encode(), []
        while data:
            longest = max((token for token in self._longer if data.startswith(token)), key=len, default=data[:1])
            ids.append(260 + self._longer.index(longest) if longest in self._longer else data[0])
            data = data[len(longest) :]
        return ids


class Written(NamedTuple):
    text: str
    is_ended: bool
    token_ids: list[int]


@cache
def bias_of(tokenizer: Any) -> npt.NDArray[np.float64]:
    is_closing = [
        tokenizer.token_text(i)[:1] in CLOSING and i not in range(256, 260) for i in range(tokenizer.vocab_size)
    ]
    bias = np.where(is_closing, 3.0, 0.0)
    bias[EOS] = 6.0
    return bias


def write(grammar: Grammar, tokenizer: Any, *, temperature: float, seed: int, max_tokens: int = 250) -> Written:
    """One answer. The higher the temperature, the less of its tokens are those that close something."""
    rng = np.random.default_rng(seed)
    vocab_size, bias = tokenizer.vocab_size, bias_of(tokenizer)
    matcher, token_ids = grammar.matcher(), list[int]()
    while not matcher.is_complete and len(token_ids) < max_tokens:
        words = bytearray(-(-vocab_size // 32) * 4)
        matcher.fill_masks(memoryview(words), ())
        assert matcher.error is None
        is_allowed = np.unpackbits(np.frombuffer(words, np.uint8), bitorder="little")[:vocab_size].astype(bool)
        assert is_allowed.any(), (tokenizer.decode(token_ids), "nothing is allowed")
        logits = np.where(is_allowed, rng.gumbel(size=vocab_size) * temperature + bias, -np.inf)
        token_id = int(logits.argmax())
        matcher.advance([token_id])
        if token_id == EOS:
            return Written(tokenizer.decode(token_ids), True, token_ids)
        token_ids.append(token_id)
    return Written(tokenizer.decode(token_ids), matcher.is_complete, token_ids)

"""Truncates the prompts of embeddings and scores to the length that a call asks for, with a warning for each."""

from __future__ import annotations

from brlite.dialects.generation import Truncation
from brlite.engine.admission import context_length
from brlite.engine.async_engine import EngineLoop

MAX_WARNINGS = 16  # proxies search only the end of a long answer for the usage; warnings stand there too


class Truncator:
    """Truncates the prompts of one call to `num_kept` tokens: those of its `truncation`, by default the context.

    Without a `truncation` it `is_off`, and nothing is truncated.
    """

    def __init__(self, truncation: Truncation | None, engine: EngineLoop) -> None:
        self.is_off = truncation is None
        self.room = 0 if truncation is None else None  # for `PromptEncoder`
        self.num_kept = context_length(engine.info)
        self._keeps_start = truncation is not None and truncation.keeps_start
        if truncation is not None and truncation.num_tokens is not None:
            self.num_kept = truncation.num_tokens
        self._special = engine.tokenizer.special_token_ids
        self._warnings: list[str] = []
        self._num_truncated = 0

    @property
    def warnings(self) -> list[str]:
        """One for each truncated prompt, up to `MAX_WARNINGS`, and one that counts the others."""
        num_further = self._num_truncated - len(self._warnings)
        return [*self._warnings, f"and {num_further} more were cut"] if num_further else self._warnings

    def truncate(self, token_ids: list[int], name: str) -> list[int]:
        """Truncate a prompt. A special token at the end that is cut stays, as one of the `num_kept` tokens.

        With the start kept that is the last token, which is the one that is pooled.
        """
        if self.is_off or len(token_ids) <= self.num_kept:
            return token_ids
        return self.truncate_between(token_ids, name, *self._special_ends(token_ids))

    def truncate_between(self, token_ids: list[int], name: str, num_first: int, num_last: int) -> list[int]:
        """Truncate a prompt between its `num_first` and `num_last` tokens, which are fewer than `num_kept` and stay."""
        if self.is_off or len(token_ids) <= self.num_kept:
            return token_ids
        self._num_truncated += 1
        if self._num_truncated <= MAX_WARNINGS:
            self._warnings.append(f"{name} was cut to {self.num_kept} tokens by truncate_prompt_tokens")
        return self._kept(token_ids, self.num_kept, num_first, num_last)

    def shorten(self, token_ids: list[int]) -> list[int]:
        """Truncate a part of a prompt to one token more than `num_kept`, so that the prompt is still truncated."""
        most = self.num_kept + 1
        if self.is_off or len(token_ids) <= most:
            return token_ids
        return self._kept(token_ids, most, *self._special_ends(token_ids))

    def _special_ends(self, token_ids: list[int]) -> tuple[int, int]:
        """The numbers of special tokens, 0 or 1, that stay at the start and at the end."""
        if self.num_kept == 1:
            return 0, 0
        is_first, is_last = token_ids[0] in self._special, token_ids[-1] in self._special
        return int(is_first and not self._keeps_start), int(is_last and self._keeps_start)

    def _kept(self, token_ids: list[int], num_tokens: int, num_first: int, num_last: int) -> list[int]:
        end = len(token_ids) - num_last
        inner, room = token_ids[num_first:end], num_tokens - num_first - num_last
        inner = inner[:room] if self._keeps_start else inner[-room:]
        return [*token_ids[:num_first], *inner, *token_ids[end:]]

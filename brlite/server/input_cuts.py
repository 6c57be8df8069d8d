"""Cuts the texts of embeddings and scores to the length that a call asks for, and says so."""

from __future__ import annotations

from brlite.dialects.generation import Truncation
from brlite.engine.admission import context_length
from brlite.engine.async_engine import EngineLoop

MAX_REPORTED_CUTS = 16  # proxies search only the end of a long answer for the usage; warnings stand there too


class InputCuts:
    """Cuts prompts as `truncation` says: to a number of tokens, or to the context. None: nothing is cut."""

    def __init__(self, truncation: Truncation | None, engine: EngineLoop) -> None:
        self.is_off = truncation is None
        self.num_kept = context_length(engine.info)
        self._keeps_start = truncation is not None and truncation.keeps_start
        if truncation is not None and truncation.num_tokens is not None:
            self.num_kept = truncation.num_tokens
        self._special = engine.tokenizer.special_token_ids
        self._warnings: list[str] = []
        self._num_cut = 0

    def cut(self, token_ids: list[int], name: str) -> list[int]:
        """Cut a prompt to `num_kept` tokens. A special token at the end that is cut stays, as one of them.

        With the start kept that is the last token, which is the one that is pooled.
        """
        if self.is_off or len(token_ids) <= self.num_kept:
            return token_ids
        return self.cut_between(token_ids, name, *self._special_ends(token_ids))

    def cut_between(self, token_ids: list[int], name: str, num_first: int, num_last: int) -> list[int]:
        """Cut a prompt to `num_kept` tokens, which are more than its `num_first` and `num_last` tokens; these stay."""
        if self.is_off or len(token_ids) <= self.num_kept:
            return token_ids
        self._num_cut += 1
        if self._num_cut <= MAX_REPORTED_CUTS:
            self._warnings.append(f"{name} was cut to {self.num_kept} tokens by truncate_prompt_tokens")
        return self._kept(token_ids, self.num_kept, num_first, num_last)

    def shorten(self, token_ids: list[int]) -> list[int]:
        """Cut a part of a prompt to one token more than `num_kept`, so that the prompt is still cut with it."""
        most = self.num_kept + 1
        if self.is_off or len(token_ids) <= most:
            return token_ids
        return self._kept(token_ids, most, *self._special_ends(token_ids))

    @property
    def warnings(self) -> list[str]:
        """One for each prompt that was cut, up to a number of them."""
        num_further = self._num_cut - len(self._warnings)
        return [*self._warnings, f"and {num_further} more were cut"] if num_further else self._warnings

    def _special_ends(self, token_ids: list[int]) -> tuple[int, int]:
        if self.num_kept == 1:
            return 0, 0
        is_first, is_last = token_ids[0] in self._special, token_ids[-1] in self._special
        return int(is_first and not self._keeps_start), int(is_last and self._keeps_start)

    def _kept(self, token_ids: list[int], num_tokens: int, num_first: int, num_last: int) -> list[int]:
        end = len(token_ids) - num_last
        inner, room = token_ids[num_first:end], num_tokens - num_first - num_last
        inner = inner[:room] if self._keeps_start else inner[-room:]
        return [*token_ids[:num_first], *inner, *token_ids[end:]]

"""DRY ("don't repeat yourself", p-e-w 2024, as llama.cpp has it): which tokens would lengthen a repetition.

Where the last tokens of a text stand in it before, the token that followed them there would make the repetition
longer. It costs `dry_multiplier` * `dry_base` ** (length - `dry_allowed_length`) logits, by the longest repetition
that it would lengthen. Text alone is read here; a backend takes the costs off its logits.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import takewhile

from brlite.sampling_params import SamplingParams
from brlite.tokenizer import Tokenizer

MAX_COST = 1e30  # of a token: no logit is near that, and it is a float32


class Repetitions:
    """One text, token by token. A new token costs time by how often the text has it; all take memory by its length.

    A repetition begins behind the last token with a sequence breaker in its text. Such tokens cost nothing. Breakers
    that several tokens spell are not found.
    """

    def __init__(self, params: SamplingParams, token_ids: Sequence[int], tokenizer: Tokenizer) -> None:
        self._params = params
        self._tokenizer = tokenizer
        self._breakers = [text.encode() for text in params.dry_sequence_breakers]
        self._is_breaker: dict[int, bool] = {}
        self._token_ids = list(token_ids)
        self._places: dict[int, list[int]] = {}
        for place, token_id in enumerate(token_ids):
            self._places.setdefault(token_id, []).append(place)
        # By the place where an earlier occurrence of the text's ending ends: how many tokens are the same.
        self._lengths: dict[int, int] = {}
        reverse = self._token_ids[::-1]
        most = sum(1 for _ in takewhile(lambda token_id: not self._breaks(token_id), reverse))
        for distance, length in enumerate(common_prefix_lengths(reverse)):
            if distance and length and most:
                self._lengths[len(reverse) - 1 - distance] = min(length, most)

    def add(self, token_id: int) -> None:
        """Append a token to the text."""
        places = self._places.setdefault(token_id, [])
        before, self._lengths = self._lengths, {}
        if not self._breaks(token_id):
            self._lengths = {place: before.get(place - 1, 0) + 1 for place in places}
        places.append(len(self._token_ids))
        self._token_ids.append(token_id)

    def costs(self) -> tuple[bytes, bytes]:
        """The tokens (int32) that would lengthen a repetition, and by how much their logits sink (float32)."""
        params, end = self._params, len(self._token_ids)
        start = 0 if params.dry_penalty_last_n < 0 else max(0, end - params.dry_penalty_last_n)
        longest: dict[int, int] = {}
        for place, length in self._lengths.items():
            length = min(length, place + 1 - start)
            token_id = self._token_ids[place + 1]
            if length >= max(params.dry_allowed_length, longest.get(token_id, 0)) and not self._breaks(token_id):
                longest[token_id] = length
        return array("i", longest).tobytes(), array("f", map(self._cost, longest.values())).tobytes()

    def _cost(self, length: int) -> float:
        params = self._params
        exponent = (length - params.dry_allowed_length) * math.log(params.dry_base)
        return float(math.exp(min(math.log(params.dry_multiplier) + exponent, math.log(MAX_COST))))

    def _breaks(self, token_id: int) -> bool:
        """Whether the token has a sequence breaker in its text."""
        found = self._is_breaker.get(token_id)
        if found is None:
            data = self._tokenizer.token_bytes(token_id)
            found = self._is_breaker[token_id] = any(breaker in data for breaker in self._breakers)
        return found


def common_prefix_lengths(items: Sequence[int]) -> list[int]:
    """How much of the beginning of `items` stands at each place of it. Linear time: the Z algorithm (Gusfield 1997)."""
    lengths = [0] * len(items)
    left = right = 0
    for place in range(1, len(items)):
        length = min(lengths[place - left], right - place) if place < right else 0
        while place + length < len(items) and items[length] == items[place + length]:
            length += 1
        lengths[place] = length
        if place + length > right:
            left, right = place, place + length
    return lengths

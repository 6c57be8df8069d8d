"""DRY ("don't repeat yourself", p-e-w 2024, as in llama.cpp): finds the tokens that would lengthen a repetition.

If the last tokens of a text occur in it earlier, the token that followed them there would lengthen the repetition.
Its cost in logits is `dry_multiplier` * `dry_base` ** (length - `dry_allowed_length`), for the longest repetition that
it would lengthen. This file reads tokens only; a backend subtracts the costs from its logits.
"""

from __future__ import annotations

import copy
import heapq
import math
from array import array
from collections.abc import Sequence
from itertools import islice, takewhile

from brlite.sampling_params import SamplingParams
from brlite.tokenizer import Tokenizer

MAX_COST = 1e30  # the largest cost of a token: far above any logit, and within float32
MAX_PLACES = 1024  # the latest occurrences of a token that are compared: up to 2 ms a token on the event loop
MAX_PROMPT_LENGTH = 1024  # of a repetition that ends the prompt; at this length any base above 1.07 costs `MAX_COST`


class Repetitions:
    """One text, token by token. Memory grows with its length, the time of a new token with its number of occurrences.

    A repetition begins after the last token with a sequence breaker in its text. Such tokens cost nothing. Breakers
    that several tokens spell are not found. If a token occurs more than `MAX_PLACES` times, new repetitions are
    looked for at its latest occurrences. The prompt's own repetition counts `MAX_PROMPT_LENGTH` tokens at most.
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
        # The index where an earlier occurrence of the text's ending ends -> its number of equal tokens.
        self._lengths: dict[int, int] = {}
        ending = islice(reversed(self._token_ids), MAX_PROMPT_LENGTH)
        most = sum(1 for _ in takewhile(lambda token_id: not self._breaks(token_id), ending))
        if most:
            data = array("i", self._token_ids).tobytes()
            places = self._places[self._token_ids[-1]][-MAX_PLACES - 1 : -1]
            self._lengths = {place: _common_ending(data, place + 1, most) for place in places}

    def copy(self) -> Repetitions:
        """A copy, to which other tokens can be added."""
        copied = copy.copy(self)
        copied._token_ids = self._token_ids.copy()
        copied._places = {token_id: places.copy() for token_id, places in self._places.items()}
        return copied

    def add(self, token_id: int) -> None:
        """Append a token to the text."""
        places = self._places.setdefault(token_id, [])
        before, self._lengths = self._lengths, {}
        if not self._breaks(token_id):
            token_ids = self._token_ids
            lengths = dict.fromkeys(places[-MAX_PLACES:], 1)
            for place, length in before.items():
                if token_ids[place + 1] == token_id:
                    lengths[place + 1] = length + 1
            if len(lengths) > 2 * MAX_PLACES:  # keep the longest; of two that are as long, the later one
                lengths = dict(heapq.nlargest(MAX_PLACES, lengths.items(), key=lambda each: (each[1], each[0])))
            self._lengths = lengths
        places.append(len(self._token_ids))
        self._token_ids.append(token_id)

    def costs(self) -> tuple[bytes, bytes]:
        """The tokens (int32) that would lengthen a repetition, and the costs of their logits (float32)."""
        params, end = self._params, len(self._token_ids)
        start = 0 if params.dry_penalty_last_n < 0 else max(0, end - params.dry_penalty_last_n)
        longest: dict[int, int] = {}
        for place, length in self._lengths.items():
            length = min(length, place + 1 - start)
            token_id = self._token_ids[place + 1]
            if length >= max(params.dry_allowed_length, longest.get(token_id, 0)) and not self._breaks(token_id):
                longest[token_id] = length
        costs = array("f")
        for length in longest.values():
            exponent = (length - params.dry_allowed_length) * math.log(params.dry_base)
            costs.append(math.exp(min(math.log(params.dry_multiplier) + exponent, math.log(MAX_COST))))
        return array("i", longest).tobytes(), costs.tobytes()

    def _breaks(self, token_id: int) -> bool:
        """Whether the token has a sequence breaker in its text."""
        found = self._is_breaker.get(token_id)
        if found is None:
            data = self._tokenizer.token_bytes(token_id)
            found = self._is_breaker[token_id] = any(breaker in data for breaker in self._breakers)
        return found


def _common_ending(data: bytes, end: int, most: int) -> int:
    """The number of int32 before index `end` that equal the last ones of `data`: at most `most`."""
    low, high, stop = 0, min(most, end), len(data)  # the search doubles the length, then halves the range
    size = 1
    while low < high:
        if data[4 * (end - size) : 4 * end] == data[stop - 4 * size :]:
            low, size = size, min(2 * size, (size + high + 1) // 2)
        else:
            high, size = size - 1, (low + size) // 2
    return low

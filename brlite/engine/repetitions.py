"""DRY ("don't repeat yourself", p-e-w 2024, as llama.cpp has it): which tokens would lengthen a repetition.

Where the last tokens of a text stand in it before, the token that followed them there would make the repetition
longer. It costs `dry_multiplier` * `dry_base` ** (length - `dry_allowed_length`) logits, by the longest repetition
that it would lengthen. Text alone is read here; a backend takes the costs off its logits.
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

MAX_COST = 1e30  # of a token: no logit is near that, and it is a float32
MAX_PLACES = 1024  # of one token in the text that are compared, the last ones: 2 ms a token on the event loop
MAX_PROMPT_LENGTH = 1024  # of a repetition that a prompt brings along; by then any base above 1.07 costs `MAX_COST`


class Repetitions:
    """One text, token by token. It takes memory by its length; a new token takes time by how often the text has it.

    A repetition begins behind the last token with a sequence breaker in its text. Such tokens cost nothing. Breakers
    that several tokens spell are not found. Of a token that the text has more than `MAX_PLACES` times, new repetitions
    are looked for at the last of these places. The prompt's own repetition counts `MAX_PROMPT_LENGTH` tokens at most.
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
        ending = islice(reversed(self._token_ids), MAX_PROMPT_LENGTH)
        most = sum(1 for _ in takewhile(lambda token_id: not self._breaks(token_id), ending))
        if most:
            data = array("i", self._token_ids).tobytes()
            places = self._places[self._token_ids[-1]][-MAX_PLACES - 1 : -1]
            self._lengths = {place: _common_ending(data, place + 1, most) for place in places}

    def copy(self) -> Repetitions:
        """The same text, to be continued otherwise."""
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


def _common_ending(data: bytes, end: int, most: int) -> int:
    """How many of the int32 before index `end` are the same as the last ones of all: at most `most`."""
    low, high, stop = 0, min(most, end), len(data)  # the search doubles the length, then halves the range
    size = 1
    while low < high:
        if data[4 * (end - size) : 4 * end] == data[stop - 4 * size :]:
            low, size = size, min(2 * size, (size + high + 1) // 2)
        else:
            high, size = size - 1, (low + size) // 2
    return low

"""How many prompt tokens fit into a step of a given duration, estimated from earlier steps.

A step's matrices take time in proportion to its tokens, attention in proportion to the positions attended. So 128
tokens of a small model take 0.1 s at the start of a prompt and 0.4 s after 8,000 others. Running streams wait for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MIN_CHUNK_TOKENS = 16  # the least prompt tokens in a step, even for a slow model
_KEPT = 0.9  # factor on the weights of earlier steps, at each new one: the load of a shared machine changes
_AIMED = 0.8  # a step is sized for this share of its time: the fit is an average, and half of the steps take longer
_MAX_RATIO = 2.0  # of the time that the fit expects of a step to the time it took: above it, an earlier step was slow


class StepPace:
    """A fit of `seconds = a * tokens + b * pairs` over the latest steps that computed prompts.

    A pair is one query and one key; n tokens behind `start` others have n * start + n² / 2 of them. The sums are those
    of weighted least squares; a negative part is taken as 0.
    """

    def __init__(self, max_seconds: float) -> None:
        self._aimed_seconds = _AIMED * max_seconds
        self._token_token = self._token_pair = self._pair_pair = 0.0
        self._token_seconds = self._pair_seconds = 0.0

    def observe(self, chunks: Sequence[tuple[int, int]], seconds: float) -> None:
        """Add a step to the fit, given the first position and the number of tokens of each of its sequences.

        Steps without a chunk of `MIN_CHUNK_TOKENS` are left out: they wait for memory more than they compute.
        """
        if max(num for _, num in chunks) < MIN_CHUNK_TOKENS:
            return
        num_tokens = sum(num for _, num in chunks)
        num_pairs = sum(num * start + num**2 / 2 for start, num in chunks)
        if self._token_token:
            per_token, per_pair = self._fit()
            expected = per_token * num_tokens + per_pair * num_pairs
            if expected > _MAX_RATIO * seconds > 0:  # in an earlier step the machine slept, or a kernel was compiled
                self._token_seconds *= _MAX_RATIO * seconds / expected
                self._pair_seconds *= _MAX_RATIO * seconds / expected
        weight = 1 / num_tokens  # so a step's weight is proportional to its tokens, not to their square
        self._token_token = _KEPT * self._token_token + weight * num_tokens**2
        self._token_pair = _KEPT * self._token_pair + weight * num_tokens * num_pairs
        self._pair_pair = _KEPT * self._pair_pair + weight * num_pairs**2
        self._token_seconds = _KEPT * self._token_seconds + weight * num_tokens * seconds
        self._pair_seconds = _KEPT * self._pair_seconds + weight * num_pairs * seconds

    def num_chunk_tokens(self, start: int, num_others: int) -> int | None:
        """How many tokens may follow the `start` first ones of a prompt, beside `num_others` tokens of the step.

        At least `MIN_CHUNK_TOKENS`. None until a step was observed.
        """
        if not self._token_token:
            return None
        per_token, per_pair = self._fit()
        seconds = max(0.0, self._aimed_seconds - per_token * num_others)
        linear = per_token + per_pair * start
        root = math.sqrt(linear**2 + 2 * per_pair * seconds)
        # The root of per_pair / 2 * n² + linear * n = seconds, in the form that is exact for a per_pair near 0.
        fitting = 2 * seconds / (linear + root) if linear + root else math.inf
        return max(MIN_CHUNK_TOKENS, int(min(fitting, 2**31)))

    def _fit(self) -> tuple[float, float]:
        """The seconds a token and the seconds a pair."""
        determinant = self._token_token * self._pair_pair - self._token_pair**2
        if determinant > 1e-6 * self._token_token * self._pair_pair:
            per_token = self._token_seconds * self._pair_pair - self._pair_seconds * self._token_pair
            per_pair = self._pair_seconds * self._token_token - self._token_seconds * self._token_pair
            if per_token >= 0 and per_pair >= 0:
                return per_token / determinant, per_pair / determinant
            if per_token < 0:
                return 0.0, self._pair_seconds / self._pair_pair
        return self._token_seconds / self._token_token, 0.0

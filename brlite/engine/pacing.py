"""How many prompt tokens fit into a step of a given duration, estimated from earlier steps.

A step's matrices take time in proportion to its tokens, attention in proportion to the positions attended. So 128
tokens of a small model take 0.1 s at the start of a prompt and 0.4 s after 8,000 others. Running streams wait for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MIN_CHUNK_TOKENS = 16  # the least prompt tokens in a step, even for a slow model
_AIMED = 0.85  # a step is sized for this share of its time: half of the steps take longer than expected
_MAX_LOG_ERROR = math.log(2.0)  # beyond it the machine has changed: it slept, compiled a kernel, or lost a core
# Variances of natural logarithms: of a step's time, and of the changes from one step to the next. The load of a shared
# machine changes the scale; the ratio is the model's.
_NOISE, _SCALE_DRIFT, _RATIO_DRIFT = 0.15**2, 0.06**2, 0.005**2


class StepPace:
    """A Kalman filter of two logarithms in `seconds = scale * (tokens + ratio * pairs)`.

    A pair is one query and one key; n tokens behind `start` others have n * start + n² / 2 of them. Steps late in a
    prompt are too alike to tell the parts from each other. They change the scale and leave the ratio as it was, so the
    next prompt, which begins at position 0, has chunks of the right size.
    """

    def __init__(self, max_seconds: float) -> None:
        self._aimed_seconds = _AIMED * max_seconds
        self._log_scale, self._log_ratio = 0.0, math.log(1 / 4096)  # 1 s a token: the first chunk is the least
        self._scale_variance, self._covariance, self._ratio_variance = 10.0**2, 0.0, 1.5**2

    def observe(self, chunks: Sequence[tuple[int, int]], seconds: float) -> None:
        """Add a step to the fit, given the first position and the number of tokens of each of its sequences.

        Steps without a chunk of `MIN_CHUNK_TOKENS` are left out: they wait for memory more than they compute.
        """
        if max(num for _, num in chunks) < MIN_CHUNK_TOKENS:
            return
        num_tokens = sum(num for _, num in chunks)
        attention = math.exp(self._log_ratio) * sum(num * start + num**2 / 2 for start, num in chunks)
        error = math.log(max(seconds, 1e-9) / (num_tokens + attention)) - self._log_scale
        small_error = max(-_MAX_LOG_ERROR, min(error, _MAX_LOG_ERROR))
        self._log_scale += error - small_error

        share = attention / (num_tokens + attention)  # the derivative by the ratio's logarithm; by the scale's it is 1
        self._scale_variance += _SCALE_DRIFT
        self._ratio_variance += _RATIO_DRIFT
        with_scale = self._scale_variance + share * self._covariance  # covariances with the step's logarithm
        with_ratio = self._covariance + share * self._ratio_variance
        variance = with_scale + share * with_ratio + _NOISE
        self._log_scale += with_scale / variance * small_error
        self._log_ratio += with_ratio / variance * small_error
        self._scale_variance -= with_scale**2 / variance
        self._covariance -= with_scale * with_ratio / variance
        self._ratio_variance -= with_ratio**2 / variance

    def num_chunk_tokens(self, start: int, other_starts: Sequence[int] = ()) -> int:
        """How many tokens may follow the `start` first ones of a prompt, beside a token at each of `other_starts`.

        At least `MIN_CHUNK_TOKENS`. Steps unlike those observed are taken to be slower by one standard deviation.
        """
        ratio = math.exp(self._log_ratio)
        linear = 1 + ratio * start
        share = 1 - 1 / linear
        variance = self._scale_variance + 2 * share * self._covariance + share**2 * self._ratio_variance
        room = self._aimed_seconds / math.exp(self._log_scale + math.sqrt(variance))
        room = max(0.0, room - len(other_starts) - ratio * sum(other_starts))
        # The root of ratio / 2 * n² + linear * n = room, in the form that is exact for a ratio near 0.
        fitting = 2 * room / (linear + math.sqrt(linear**2 + 2 * ratio * room))
        return max(MIN_CHUNK_TOKENS, int(min(fitting, 2**31)))

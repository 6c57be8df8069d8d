"""From a prompt's last hidden state to its score: the head of models that say how well two texts go together."""

from __future__ import annotations

import math
import operator
from array import array

import msgspec

from brlite.sampling_params import PoolingParams

# What a score is made of: the hidden state of the last token as it is.
SCORING = PoolingParams(pooling="last", normalize=False)
MAX_EXPONENT = 700.0  # e to this is still a float64


class ScoringHead(msgspec.Struct, frozen=True):
    """One row that is multiplied with the last hidden state. `weight` is float32 [H].

    With `has_sigmoid` a score is the sigmoid of that product, from 0 to 1, where a request leaves it open.
    """

    weight: array[float]
    has_sigmoid: bool = True

    def score(self, hidden: array[float], *, use_activation: bool | None = None) -> float:
        """The score of a text whose last hidden state is `hidden`, float32 [H]. It is computed in float64."""
        logit = float(sum(map(operator.mul, self.weight, hidden)))
        if use_activation is False or (use_activation is None and not self.has_sigmoid):
            return logit
        return 1.0 / (1.0 + math.exp(min(-logit, MAX_EXPONENT)))

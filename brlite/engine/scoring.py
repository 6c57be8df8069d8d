"""Computes a prompt's score from its last hidden state: the head of rerankers (cross-encoders)."""

from __future__ import annotations

import math
import operator
from array import array

import msgspec

from brlite.errors import InvalidRequest
from brlite.sampling_params import PoolingParams
from brlite.tokenizer.pair_template import PairTemplate

# A score is computed from the last token's hidden state, without normalization. Admission compares by identity: a model
# that scores need not have embeddings.
SCORING = PoolingParams(pooling="last", normalize=False)
MAX_EXPONENT = 700.0  # e to this is still a float64


class ScoringHead(msgspec.Struct, frozen=True):
    """A dot product with the last hidden state. `weight` is float32 [H].

    With `has_sigmoid` a score is by default the sigmoid of that product, from 0 to 1. `template` makes the prompt of a
    pair; without one it is the tokens of the first text and then of the second.
    """

    weight: array[float]
    has_sigmoid: bool = True
    template: PairTemplate | None = None

    def check_instruction(self, instruction: str | None) -> None:
        """Raise `InvalidRequest` for an instruction for which the prompt of a pair has no place."""
        if instruction is not None and not (self.template and self.template.takes_instruction):
            raise InvalidRequest(
                "instruction has no effect: the prompt of a pair has no place for it (score_template without "
                "{instruction}); write it into the query",
                param="instruction",
                code="unsupported_parameter",
            )

    def score(self, hidden: array[float], *, use_activation: bool | None = None) -> float:
        """The score of a text whose last hidden state is `hidden`, float32 [H]. It is computed in float64."""
        logit = float(sum(map(operator.mul, self.weight, hidden)))
        if use_activation is False or (use_activation is None and not self.has_sigmoid):
            return logit
        return 1.0 / (1.0 + math.exp(min(-logit, MAX_EXPONENT)))

"""How each row of a step is to be drawn, as arrays of one number per row. Knows no logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from brlite.backends.sampling.random_numbers import Floats, Integers, uniform
from brlite.engine.backend import SamplingInput

MAX_TEMPERATURE = 1e37  # near the largest float; every distribution is flat long before
MAX_PENALTY = 1e30  # a penalty beyond this, either way, acts as this: its products stay finite in float64


class RowSettings(NamedTuple):
    """Temperature, truncation and random number of each row. `top_k` is the vocabulary's size where it is off."""

    temperature: Floats
    top_k: Integers
    top_p: Floats
    min_p: Floats
    uniform: Floats

    @classmethod
    def of(cls, inputs: Sequence[SamplingInput], vocab_size: int) -> RowSettings:
        params = [row.params for row in inputs]
        top_k = [vocab_size if row.top_k == -1 else min(row.top_k, vocab_size) for row in params]
        return cls(
            temperature=np.array([min(row.temperature, MAX_TEMPERATURE) for row in params], dtype=np.float64),
            top_k=np.array(top_k, dtype=np.int64),
            top_p=np.array([row.top_p for row in params], dtype=np.float64),
            min_p=np.array([row.min_p for row in params], dtype=np.float64),
            uniform=np.array([uniform(row.seed, row.position) for row in inputs], dtype=np.float64),
        )

    def take(self, rows: Integers | slice) -> RowSettings:
        """The settings of some of the rows, in that order."""
        return RowSettings(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            uniform=self.uniform[rows],
        )

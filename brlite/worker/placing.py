"""A checkpoint's tensors on their way into a decoder, whichever backend it is for: one at a time, as it wants them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from brlite.checkpoint import Checkpoint
from brlite.models.family import Place
from brlite.worker.fit import Fit

Float32 = npt.NDArray[np.float32]

ROWS_AT_A_TIME = 4096  # bounds the copies that scaling makes
SHORTEST = 1e-12  # a row of zeros stays one


def placed_tensors(
    checkpoint: Checkpoint, fit: Fit, on_progress: Callable[[float], None]
) -> Iterator[tuple[Place, Float32]]:
    """Every tensor that has a place, with it. None is kept: memory is what the caller holds plus one tensor.

    `on_progress` gets the fraction that is done, each time the caller comes back for more.
    """
    total = sum(math.prod(place.shape) for place in fit.places.values())
    num_placed = 0
    for name, values in checkpoint.tensors():
        if name in fit.ignored:
            continue
        place = fit.places[name]
        if place.has_unit_rows:
            _scale_rows_(values)
        num_placed += values.size
        yield place, values
        del values  # before the next one is read
        on_progress(num_placed / total)


def _scale_rows_(matrix: Float32) -> None:
    """Scale every row to length 1, in place."""
    for start in range(0, len(matrix), ROWS_AT_A_TIME):
        rows = matrix[start : start + ROWS_AT_A_TIME]
        lengths = np.sqrt(np.square(rows).sum(axis=1, keepdims=True, dtype=np.float64))
        rows /= np.maximum(lengths, SHORTEST).astype(np.float32)

"""A checkpoint's tensors on their way into a decoder, whichever backend it is for: one at a time, as it wants them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from brlite.checkpoint import Checkpoint
from brlite.checkpoint.checked_model import CheckedModel
from brlite.checkpoint.slices import Slice, read_cuts
from brlite.models.families.family import WeightTarget
from brlite.models.shards import ShardSlice

Float32 = npt.NDArray[np.float32]
Parts = Mapping[str, ShardSlice]

ROWS_AT_A_TIME = 4096  # bounds the copies that scaling makes
SHORTEST = 1e-12  # a row of zeros stays one


def placed_tensors(
    checkpoint: Checkpoint, fit: CheckedModel, on_progress: Callable[[float], None], parts: Parts | None = None
) -> Iterator[tuple[WeightTarget, Float32]]:
    """Every tensor that has a place, with it. None is kept: memory is what the caller holds plus one tensor.

    With `parts` only what a rank holds comes, a piece at a time, with its place in the rank's own parameters.
    `on_progress` gets the fraction that is done, each time the caller comes back for more.
    """
    pieces = _whole(checkpoint, fit) if parts is None else _in_parts(checkpoint, fit, parts)
    total = sum(math.prod(place.shape) for place in fit.places.values()) if parts is None else _num_held(fit, parts)
    num_placed = 0
    for place, values in pieces:
        if place.has_unit_rows:
            _scale_rows_(values)
        num_placed += values.size
        yield place, values
        del values  # before the next one is read
        on_progress(num_placed / total)


def _whole(checkpoint: Checkpoint, fit: CheckedModel) -> Iterator[tuple[WeightTarget, Float32]]:
    for name, values in checkpoint.tensors():
        if name not in fit.ignored:
            yield fit.places[name], values
        del values  # before the next one is read


def _in_parts(checkpoint: Checkpoint, fit: CheckedModel, parts: Parts) -> Iterator[tuple[WeightTarget, Float32]]:
    own = {name: _own_places(place, parts[place.parameter]) for name, place in fit.places.items()}
    for name, cut, values in read_cuts(checkpoint, {name: tuple(cuts) for name, cuts in own.items()}):
        yield own[name][cut], values
        del values  # before the next one is read


def _own_places(place: WeightTarget, part: ShardSlice) -> dict[Slice, WeightTarget]:
    """What a rank holds of the tensor that has this place, and where in the rank's own parameter that goes."""
    own: dict[Slice, WeightTarget] = {}
    num_before = 0
    for rows in part.rows:
        first, stop = max(rows.start, place.start), min(rows.stop, place.start + place.shape[0])
        if first < stop:
            shape = (stop - first, *([len(part.columns)] if part.columns is not None else place.shape[1:]))
            cut = Slice(range(first - place.start, stop - place.start), part.columns)
            own[cut] = WeightTarget(place.parameter, shape, num_before + first - rows.start, place.has_unit_rows)
        num_before += len(rows)
    return own


def _num_held(fit: CheckedModel, parts: Parts) -> int:
    places = (own for place in fit.places.values() for own in _own_places(place, parts[place.parameter]).values())
    return sum(math.prod(own.shape) for own in places)


def _scale_rows_(matrix: Float32) -> None:
    """Scale every row to length 1, in place."""
    for start in range(0, len(matrix), ROWS_AT_A_TIME):
        rows = matrix[start : start + ROWS_AT_A_TIME]
        lengths = np.sqrt(np.square(rows).sum(axis=1, keepdims=True, dtype=np.float64))
        rows /= np.maximum(lengths, SHORTEST).astype(np.float32)

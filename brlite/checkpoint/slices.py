"""Some rows and columns of a checkpoint's tensors, for ranks that hold a part of a model each.

A format whose numbers lie in plain rows reads just them; of the others a tensor is read whole and cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from brlite.checkpoint.checkpoint import Checkpoint

Float32 = npt.NDArray[np.float32]


class Slice(NamedTuple):
    """Rows of a tensor, or numbers of a vector; of each row these columns, or all."""

    rows: range
    columns: range | None = None

    def of(self, tensor: Float32) -> Float32:
        """A copy of that part of `tensor`."""
        rows = tensor[self.rows.start : self.rows.stop]
        part: Float32 = (rows if self.columns is None else rows[:, self.columns.start : self.columns.stop]).copy()
        return part


Cuts = Mapping[str, Sequence[Slice]]


@runtime_checkable
class SlicesItself(Protocol):
    """A checkpoint that need not read what is cut off."""

    def cuts(self, wanted: Cuts) -> Iterator[tuple[str, Slice, Float32]]: ...


def read_cuts(checkpoint: Checkpoint, wanted: Cuts) -> Iterator[tuple[str, Slice, Float32]]:
    """What is `wanted` of each tensor, one cut at a time, in the order of the file."""
    if isinstance(checkpoint, SlicesItself):
        yield from checkpoint.cuts(wanted)
        return
    for name, tensor in checkpoint.tensors():
        for cut in wanted.get(name, ()):
            yield name, cut, cut.of(tensor)
        del tensor  # before the next one is read

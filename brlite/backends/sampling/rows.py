"""A step's logits and the queries of the sampler: on the host here, on a card in `backends/torch/candidates.py`.

Whole rows are not copied. A sampler reads the best tokens, sums over a row, and single logits. The arithmetic that
decides on a token is in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from brlite.backends.sampling.random_numbers import Floats, Integers

Logits = npt.NDArray[np.float32]
Booleans = npt.NDArray[np.bool_]

BLOCK_SIZE = 512  # tokens whose weights are summed together; only one block of a row is read token by token


class Shortlist(NamedTuple):
    """The `size` highest logits of each row, with their token ids [R, size], best first, ties by lower id."""

    token_ids: Integers
    values: Logits
    is_whole_row: bool

    def is_exact(self, lengths: Integers) -> Booleans:
        """Whether the first `lengths[row]` entries are certainly the best: no token left out ties with the last."""
        last = np.take_along_axis(self.values, lengths[:, None] - 1, axis=1)[:, 0]
        return (last > self.values[:, -1]) | self.is_whole_row


class LogitRows(Protocol):
    """Logits [R, V] float32. All results for a row are independent of the other rows."""

    @property
    def vocab_size(self) -> int: ...

    def __len__(self) -> int: ...

    def take(self, rows: Integers) -> LogitRows:
        """Some of the rows, in that order. They may share memory with these: do not write to them."""
        ...

    def copy(self) -> LogitRows: ...

    def best(self) -> tuple[Integers, Logits]:
        """The best token of each row and its logit. Of equal ones the lowest id; NaN for a row that has a NaN."""
        ...

    def gather(self, rows: Integers, token_ids: Integers) -> Logits:
        """The logits of the given (row, token) pairs."""
        ...

    def scatter(self, rows: Integers, token_ids: Integers, values: Logits) -> None:
        """Set the logits of the given (row, token) pairs, which are distinct."""
        ...

    def forbid(self, rows: Integers, words: npt.NDArray[np.int32]) -> None:
        """Set to -inf the tokens that `words` [N, ceil(V / 32)] forbid in `rows`: bit t % 32 of word t // 32 is 0."""
        ...

    def shortlist(self, size: int) -> Shortlist:
        """The shortlist of `size` tokens of each row, or of the whole row if that is shorter."""
        ...

    def block_sums(self, best: Logits, temperature: Floats) -> Floats:
        """Sums [R, B] of exp((logit - best) / temperature) over blocks of `BLOCK_SIZE` tokens, the last one shorter."""
        ...

    def standard_deviations(self, best: Logits) -> Floats:
        """The standard deviation (population) of each row's logits above -inf."""
        ...

    def block(self, numbers: Integers) -> Logits:
        """One block of each row [R, BLOCK_SIZE]; a shorter last block is padded with -inf."""
        ...


class NumpyRows:
    """`LogitRows` in memory. `scatter` and `forbid` write into `logits`."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits

    @property
    def vocab_size(self) -> int:
        return int(self.logits.shape[1])

    def __len__(self) -> int:
        return len(self.logits)

    def take(self, rows: Integers) -> NumpyRows:
        return self if len(rows) == len(self) else NumpyRows(self.logits[rows])

    def copy(self) -> NumpyRows:
        return NumpyRows(self.logits.copy())

    def best(self) -> tuple[Integers, Logits]:
        token_ids = self.logits.argmax(axis=1)
        return token_ids, self.gather(np.arange(len(self)), token_ids)

    def gather(self, rows: Integers, token_ids: Integers) -> Logits:
        return self.logits[rows, token_ids]

    def scatter(self, rows: Integers, token_ids: Integers, values: Logits) -> None:
        self.logits[rows, token_ids] = values

    def forbid(self, rows: Integers, words: npt.NDArray[np.int32]) -> None:
        for row, some in zip(rows.tolist(), words, strict=True):
            bits = np.unpackbits(some.view(np.uint8), bitorder="little")
            self.logits[row, bits[: self.vocab_size] == 0] = -np.inf

    def shortlist(self, size: int) -> Shortlist:
        if size >= self.vocab_size:
            token_ids = np.argsort(-self.logits, axis=1, kind="stable")
            return Shortlist(token_ids, np.take_along_axis(self.logits, token_ids, axis=1), is_whole_row=True)
        token_ids = np.stack([_best_of(row, size) for row in self.logits])
        return sorted_shortlist(token_ids, np.take_along_axis(self.logits, token_ids, axis=1))

    def block_sums(self, best: Logits, temperature: Floats) -> Floats:
        starts = np.arange(0, self.vocab_size, BLOCK_SIZE)
        sums = [
            np.add.reduceat(np.exp((row.astype(np.float64) - one_best) / one_temperature), starts)
            for row, one_best, one_temperature in zip(self.logits, best.astype(np.float64), temperature, strict=True)
        ]
        return np.stack(sums)

    def standard_deviations(self, best: Logits) -> Floats:
        return np.array([row[row > -np.inf].astype(np.float64).std() for row in self.logits])

    def block(self, numbers: Integers) -> Logits:
        columns = numbers[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        found = np.take_along_axis(self.logits, np.minimum(columns, self.vocab_size - 1), axis=1)
        return np.where(columns < self.vocab_size, found, np.float32(-np.inf))


def _best_of(row: Logits, size: int) -> Integers:
    """The ids of the best tokens of a row, in any order.

    The best logits of 4 * size ranges give a lower bound for the result: ten times as fast as to partition a vocabulary
    of 150,000.
    """
    starts = np.arange(0, len(row), max(1, len(row) // (4 * size)))
    enough = np.partition(np.maximum.reduceat(row, starts), -size)[-size]
    token_ids = np.flatnonzero(row >= enough)
    if len(token_ids) < size:  # the row holds NaN
        token_ids = np.arange(len(row))
    return token_ids[np.argpartition(row[token_ids], -size)[-size:]]


def sorted_shortlist(token_ids: Integers, values: Logits) -> Shortlist:
    """The shortlist of each row, from its best tokens in any order."""
    order = np.lexsort((token_ids, -values), axis=1)
    return Shortlist(np.take_along_axis(token_ids, order, axis=1), np.take_along_axis(values, order, axis=1), False)


def allowed_words(token_ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int32]:
    """The words [ceil(V / 32)] of a mask that allows these tokens alone."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)

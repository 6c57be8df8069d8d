"""The inputs of a step in one array of int32, which is copied to the card in one transfer.

Sequences of a single token come first, in the order that they were given, then the longer runs. Each part of the array
begins at a multiple of 16 bytes: Triton compiles a kernel again for a pointer that is aligned otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brlite.backends.torch.device import send
from brlite.backends.torch.steps import Run

Integers = npt.NDArray[np.int32]

_ALIGNED = 4  # numbers in 16 bytes


class TokenRun(NamedTuple):
    """A `Run` that is made here: one that pads a step, or one token of a longer run."""

    start: int
    token_ids: list[int]
    block_table: list[int]


class StepInputs(NamedTuple):
    """Views of one array on the device. T rows, S sequences, of which the first `num_singles` are one token each.

    `token_ids`, `sources`, `positions` and `slots` are [T]; `starts`, `lengths` and `first_rows` [S]; `tables` [S, W].
    If a row's source is not -1, its token is the previous step's draw at that index.
    `single_tiles` and `tiles` are the sequence and the first token of each tile of rows for attention.
    """

    token_ids: Tensor
    sources: Tensor
    positions: Tensor
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    first_rows: Tensor
    tables: Tensor
    single_tiles: tuple[Tensor, Tensor]
    tiles: tuple[Tensor, Tensor]
    num_singles: int
    max_context: int

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_tiles(self) -> int:
        return len(self.tiles[0])

    def num_splits(self, split: int) -> int:
        """The number of splits of the longest context of the single tokens."""
        return -(-self.max_context // split)


class StepLayout(NamedTuple):
    """The same in an array on the host, before the transfer. `rows` has the row of each run's first token."""

    array: Integers
    rows: list[int]
    num_rows: int
    num_singles: int
    num_tiles: int
    table_width: int
    max_context: int

    def on(self, device_array: Tensor) -> StepInputs:
        """The views of `device_array`, which holds a copy of `array`."""
        rest = device_array
        num_seqs = len(self.rows)

        def take(*shape: int) -> Tensor:
            nonlocal rest
            size = int(np.prod(shape))
            part, rest = rest[:size].view(shape), rest[_padded(size) :]
            return part

        return StepInputs(
            token_ids=take(self.num_rows),
            sources=take(self.num_rows),
            positions=take(self.num_rows),
            slots=take(self.num_rows),
            starts=take(num_seqs),
            lengths=take(num_seqs),
            first_rows=take(num_seqs),
            single_tiles=(take(self.num_singles), take(self.num_singles)),
            tiles=(take(self.num_tiles), take(self.num_tiles)),
            tables=take(num_seqs, self.table_width),
            num_singles=self.num_singles,
            max_context=self.max_context,
        )


class TableRows:
    """The block tables of the rows of successive steps as one array [S, W].

    A row is converted only if its table is not that of the step before: comparing two lists of the same integers takes
    a tenth of the time, and a sequence that decodes has a new block every `block_size` steps.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self.array = np.zeros((num_rows, width), np.int32)
        self._known: list[list[int]] = [[] for _ in range(num_rows)]

    def update(self, runs: Sequence[Run]) -> None:
        """Take the tables of `runs`, one for each row."""
        for number, run in enumerate(runs):
            if self._known[number] != run.block_table:
                self._known[number] = list(run.block_table)
                used = run.block_table[: self.array.shape[1]]
                self.array[number, : len(used)] = used
                self.array[number, len(used) :] = 0


def lay_out_singles(
    runs: Sequence[Run], block_size: int, tables: TableRows, *, sources: Sequence[int] = ()
) -> StepLayout:
    """As `lay_out` for runs of one token each, with tables of a fixed width, in a fraction of the time.

    A graph's step is short: with 64 rows and `lay_out`, a 1B model would wait for the host.
    """
    num_rows = len(runs)
    tables.update(runs)
    numbers = np.arange(num_rows, dtype=np.int32)
    positions = np.array([run.start for run in runs], np.int32)
    source_of_row = np.full(num_rows, -1, np.int32)
    source_of_row[: len(sources)] = sources
    slots = tables.array[numbers, positions // block_size] * block_size + positions % block_size
    token_ids, one = np.array([run.token_ids[0] for run in runs], np.int32), np.ones_like(numbers)
    columns = (token_ids, source_of_row, positions, slots, positions, one, numbers, numbers, np.zeros_like(numbers))
    array = np.zeros(len(columns) * _padded(num_rows) + _padded(tables.array.size), np.int32)
    for column, begin in zip(columns, range(0, len(array), _padded(num_rows)), strict=False):
        array[begin : begin + num_rows] = column
    array[len(columns) * _padded(num_rows) :][: tables.array.size] = tables.array.ravel()
    context = int(positions.max(initial=-1)) + 1
    return StepLayout(array, list(range(num_rows)), num_rows, num_rows, 0, tables.array.shape[1], context)


def lay_out(runs: Sequence[Run], block_size: int, tile_tokens: int, *, sources: Sequence[int] = ()) -> StepLayout:
    """The inputs of a step that computes `runs`. Tables have the width of the longest.

    `sources` are those of the first tokens of the first runs, as in `LastDraws`.
    """
    lengths = np.array([len(run.token_ids) for run in runs], np.int32)
    order = np.argsort(lengths > 1, kind="stable")
    ordered = [runs[index] for index in order]
    lengths = lengths[order]
    starts = np.array([run.start for run in ordered], np.int32)
    first_rows = np.zeros(len(runs), np.int32)
    np.cumsum(lengths[:-1], out=first_rows[1:])
    num_singles = int((lengths == 1).sum())
    num_rows = int(lengths.sum())
    width = max(-(-int(end) // block_size) for end in starts + lengths)
    tables = np.zeros((len(runs), width), np.int32)
    for row, run in zip(tables, ordered, strict=True):
        used = run.block_table[:width]
        row[: len(used)] = used
    seq_of_row = np.repeat(np.arange(len(runs), dtype=np.int32), lengths)
    positions = starts[seq_of_row] + np.arange(num_rows, dtype=np.int32) - first_rows[seq_of_row]
    slots = tables[seq_of_row, positions // block_size] * block_size + positions % block_size
    token_ids = np.fromiter((token for run in ordered for token in run.token_ids), np.int32, num_rows)
    source_of_row = np.full(num_rows, -1, np.int32)
    source_of_run = np.full(len(runs), -1, np.int32)
    source_of_run[: len(sources)] = sources
    source_of_row[first_rows] = source_of_run[order]
    singles = np.arange(num_singles, dtype=np.int32)
    counts = -(-lengths[num_singles:] // tile_tokens)
    tile_seqs = np.repeat(np.arange(num_singles, len(runs), dtype=np.int32), counts)
    first_tiles = np.cumsum(counts) - counts
    tile_firsts = (np.arange(len(tile_seqs)) - np.repeat(first_tiles, counts)) * tile_tokens
    parts = (
        *(token_ids, source_of_row, positions, slots, starts, lengths, first_rows, singles, np.zeros_like(singles)),
        *(tile_seqs, tile_firsts, tables.ravel()),
    )
    rows = np.empty(len(runs), np.int64)
    rows[order] = first_rows
    context = int((starts + lengths)[:num_singles].max(initial=0))
    array = np.zeros(sum(_padded(part.size) for part in parts), np.int32)
    begin = 0
    for part in parts:
        array[begin : begin + part.size] = part
        begin += _padded(part.size)
    return StepLayout(array, rows.tolist(), num_rows, num_singles, len(tile_seqs), width, context)


def _padded(size: int) -> int:
    """`size` numbers, filled up so that the next part is aligned."""
    return -(-size // _ALIGNED) * _ALIGNED


def transfer(layout: StepLayout, device: torch.device) -> StepInputs:
    """The inputs on the device, in a new array."""
    return layout.on(send(layout.array, device))

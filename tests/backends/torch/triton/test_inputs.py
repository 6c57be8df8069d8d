"""What a step reads, as it is laid out on the host."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brlite.backends.torch.triton.inputs import StepInputs, TableRows, TokenRun, lay_out, lay_out_singles, transfer

BLOCK_SIZE = 4
CPU = torch.device("cpu")


@st.composite
def step_runs(draw: st.DrawFn) -> list[TokenRun]:
    """Runs of several sequences, on blocks of their own, with some blocks more than they use."""
    spans = draw(
        st.lists(st.tuples(st.integers(0, 30), st.integers(1, 1) | st.integers(1, 20)), min_size=1, max_size=6)
    )
    blocks = iter(draw(st.permutations(range(100))))
    first_ids = draw(st.lists(st.integers(0, 2**31 - 21), min_size=len(spans), max_size=len(spans)))
    return [
        TokenRun(start, list(range(first, first + length)), [next(blocks) for _ in range((start + length) // 4 + 2)])
        for first, (start, length) in zip(first_ids, spans, strict=True)
    ]


def places(runs: Sequence[TokenRun]) -> list[int]:
    """Which of the runs are of a single token, then which are longer: their order in a step."""
    return sorted(range(len(runs)), key=lambda index: len(runs[index].token_ids) > 1)


@given(step_runs())
def test_every_row_has_its_token_its_position_and_its_slot(runs: list[TokenRun]) -> None:
    layout = lay_out(runs, BLOCK_SIZE, 3)

    inputs = transfer(layout, CPU)

    ordered = [runs[index] for index in places(runs)]
    expected = [
        (token_id, position, run.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        for run in ordered
        for position, token_id in enumerate(run.token_ids, run.start)
    ]
    columns = (inputs.token_ids, inputs.positions, inputs.slots)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    for run, row in zip(runs, layout.rows, strict=True):
        assert inputs.token_ids[row : row + len(run.token_ids)].tolist() == run.token_ids
    assert inputs.num_rows == layout.num_rows == sum(len(run.token_ids) for run in runs)


@given(step_runs(), st.integers(1, 9))
def test_every_part_is_aligned_so_that_no_step_needs_a_kernel_of_its_own(
    runs: list[TokenRun], tile_tokens: int
) -> None:
    inputs = transfer(lay_out(runs, BLOCK_SIZE, tile_tokens), CPU)

    parts = [part for each in inputs for part in (each if isinstance(each, tuple) else (each,))]
    offsets = {part.storage_offset() % 4 for part in parts if isinstance(part, torch.Tensor) and part.numel()}
    assert offsets == {0}


@given(step_runs())
def test_every_sequence_has_its_span_and_its_table(runs: list[TokenRun]) -> None:
    inputs = transfer(lay_out(runs, BLOCK_SIZE, 3), CPU)

    ordered = [runs[index] for index in places(runs)]
    assert inputs.starts.tolist() == [run.start for run in ordered]
    assert inputs.lengths.tolist() == [len(run.token_ids) for run in ordered]
    assert inputs.first_rows.tolist() == np.cumsum([0, *map(len, (run.token_ids for run in ordered))])[:-1].tolist()
    ends = [run.start + len(run.token_ids) for run in ordered]
    assert inputs.tables.shape[1] == -(-max(ends) // BLOCK_SIZE)
    for table, run, end in zip(inputs.tables.tolist(), ordered, ends, strict=True):
        num_used = -(-end // BLOCK_SIZE)
        assert table[:num_used] == run.block_table[:num_used]
    singles = [run for run in runs if len(run.token_ids) == 1]
    assert inputs.num_singles == len(singles)
    assert inputs.max_context == max((run.start + 1 for run in singles), default=0)


@given(step_runs(), st.integers(1, 9))
def test_tiles_cover_each_row_once(runs: list[TokenRun], tile_tokens: int) -> None:
    inputs = transfer(lay_out(runs, BLOCK_SIZE, tile_tokens), CPU)

    assert tiled_rows(inputs, inputs.single_tiles, 1) == list(range(inputs.num_singles))
    assert tiled_rows(inputs, inputs.tiles, tile_tokens) == list(range(inputs.num_singles, inputs.num_rows))


def tiled_rows(inputs: StepInputs, tiles: tuple[torch.Tensor, torch.Tensor], tile_tokens: int) -> list[int]:
    """The rows that programs of these tiles compute, one after another."""
    rows: list[int] = []
    for seq, first in zip(*(column.tolist() for column in tiles), strict=True):
        length, first_row = int(inputs.lengths[seq]), int(inputs.first_rows[seq])
        rows += [first_row + token for token in range(first, min(first + tile_tokens, length))]
    return rows


def test_a_table_may_be_wider_and_may_hold_more_blocks_than_it_shows() -> None:
    runs = [TokenRun(5, [1], [7, 8, 9, 10, 11]), TokenRun(0, [2], [12])]

    inputs = transfer(lay_out_singles(runs, BLOCK_SIZE, TableRows(2, 4)), CPU)

    assert inputs.tables.tolist() == [[7, 8, 9, 10], [12, 0, 0, 0]]


def test_steps_of_as_many_rows_have_arrays_of_one_shape_whatever_their_contexts() -> None:
    filler = TokenRun(0, [0], [99])
    steps = [[filler] * 4, [TokenRun(38, [5], list(range(10))), TokenRun(3, [6], [20]), filler, filler]]

    layouts = [lay_out_singles(runs, BLOCK_SIZE, TableRows(4, 10)) for runs in steps]

    assert layouts[0].array.shape == layouts[1].array.shape
    assert layouts[1].rows == [0, 1, 2, 3]


@given(st.lists(step_runs(), min_size=1, max_size=4), st.integers(-1, 5))
def test_single_tokens_are_laid_out_alike_by_either_function(steps: list[list[TokenRun]], source: int) -> None:
    """Also when a row had another table, longer or shorter, in the step before."""
    num_rows = min(map(len, steps))
    tables = TableRows(num_rows, 30)

    for step in steps:
        runs = [run._replace(token_ids=run.token_ids[:1]) for run in step[:num_rows]]
        found = lay_out_singles(runs, BLOCK_SIZE, tables, sources=[source])
        general = lay_out(runs, BLOCK_SIZE, 1, sources=[source])
        one, other = found.on(torch.from_numpy(found.array)), general.on(torch.from_numpy(general.array))
        for name in StepInputs._fields:
            if name != "tables":
                assert str(getattr(one, name)) == str(getattr(other, name)), name
        assert one.tables.tolist() == [run.block_table + [0] * (30 - len(run.block_table)) for run in runs]
        assert found.rows == general.rows


@settings(max_examples=20)  # each of 25 steps
@given(st.randoms(use_true_random=False))
def test_rows_of_many_steps_are_those_of_the_general_layout(random: Random) -> None:
    """Sequences grow, wait, are preempted and come back under their number with other blocks, in other rows."""
    tables, owned = TableRows(4, 8), dict[int, list[int]]()
    for _ in range(25):
        seq_id, action = random.randrange(6), random.random()
        if action < 0.3:
            owned.pop(seq_id, None)
        elif action < 0.5 and seq_id in owned:
            del owned[seq_id][random.randint(1, len(owned[seq_id])) :]
        elif len(owned.setdefault(seq_id, [])) < 8:
            owned[seq_id].append(random.randrange(100))
        chosen = random.sample(sorted(owned), min(len(owned), random.randint(0, 4)))
        runs = [TokenRun(random.randrange(4 * len(owned[number])), [number], owned[number]) for number in chosen]
        runs += [TokenRun(0, [0], [99])] * (4 - len(runs))

        found = transfer(lay_out_singles(runs, BLOCK_SIZE, tables), CPU)
        general = transfer(lay_out(runs, BLOCK_SIZE, 1), CPU)

        assert found.slots.tolist() == general.slots.tolist()
        assert found.tables.tolist() == [run.block_table + [0] * (8 - len(run.block_table)) for run in runs]


def test_a_table_that_its_owner_changes_in_place_is_taken_anew() -> None:
    run, tables = TokenRun(3, [1], [7]), TableRows(1, 3)
    for block in (8, 9):
        run.block_table.append(block)

        layout = lay_out_singles([run], BLOCK_SIZE, tables)

        assert transfer(layout, CPU).tables[0, : len(run.block_table)].tolist() == run.block_table


def test_the_splits_are_those_of_the_longest_context_of_a_single_token() -> None:
    runs = [TokenRun(0, [1] * 600, list(range(150))), TokenRun(256, [1], list(range(150, 250)))]

    inputs = transfer(lay_out(runs, BLOCK_SIZE, 128), CPU)

    assert inputs.max_context == 257
    assert inputs.num_splits(256) == 2

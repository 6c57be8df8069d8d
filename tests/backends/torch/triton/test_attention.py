"""Attention over pages, against a softmax over what each row sees, in float64."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor

from brlite.backends.torch import kv_cache
from brlite.backends.torch.probe import PLAIN_CONFIG
from brlite.backends.torch.triton.attention import AttentionShape, LayerPages, attend, tile_tokens
from brlite.backends.torch.triton.inputs import StepInputs, TableRows, TokenRun, lay_out, lay_out_singles, transfer

BLOCK_SIZE = 16
NUM_BLOCKS = 64
MAX_ERROR = 0.02  # of a head's length: weights and results are rounded to bfloat16

# Rows that only fill a tile may see nothing, and are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")

# Spans (start, length) of a step's sequences: single tokens and chunks, contexts within a split and over some.
MIXED = [(0, 1), (17, 1), (0, 37), (40, 5), (300, 1), (250, 20)]
SHORT = [(0, 1), (21, 1), (0, 7), (30, 9)]


class Pages(NamedTuple):
    """A layer's pages, and keys and values [slots, Hk, D] that they stand for, in float64."""

    layer: LayerPages
    keys: Tensor
    values: Tensor


def make_runs(spans: list[tuple[int, int]]) -> list[TokenRun]:
    """Runs of these spans, on blocks that lie anywhere."""
    blocks = iter(random.Random(len(spans)).sample(range(NUM_BLOCKS), NUM_BLOCKS))
    return [
        TokenRun(start, [0] * length, list(itertools.islice(blocks, -(-(start + length) // BLOCK_SIZE))))
        for start, length in spans
    ]


def slots_of(run: TokenRun) -> list[int]:
    """Where the keys of a run's context are."""
    context = range(run.start + len(run.token_ids))
    return [run.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in context]


def make_pages(shape: AttentionShape, runs: list[TokenRun], *, is_int8: bool = False) -> Pages:
    """Pages in which all contexts have keys and values; what is beyond them is not a number."""
    generator = torch.Generator().manual_seed(1)
    size = (NUM_BLOCKS, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    keys, values = (torch.randn(size, generator=generator) for _ in range(2))
    is_unused = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    is_unused[[slot for run in runs for slot in slots_of(run)]] = False
    if not is_int8:
        keys, values = keys.bfloat16(), values.bfloat16()
        for part in (keys, values):
            part.flatten(0, 1)[is_unused] = torch.nan
        layer = LayerPages(keys, values, None, None)
        return Pages(layer, keys.double().flatten(0, 1), values.double().flatten(0, 1))
    stored = [kv_cache.Pages(torch.zeros(size, dtype=torch.int8), torch.zeros((*size[:-1], 1))) for _ in range(2)]
    for page, heads in zip(stored, (keys, values), strict=True):
        page.write(torch.arange(NUM_BLOCKS * BLOCK_SIZE), heads.flatten(0, 1))
        page.scales.flatten(0, 1)[is_unused] = torch.nan
    layer = LayerPages(stored[0].values, stored[1].values, stored[0].scales, stored[1].scales)
    return Pages(layer, *((page.values.double() * page.scales).flatten(0, 1) for page in stored))


def make_query(shape: AttentionShape, inputs: StepInputs) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((inputs.num_rows, shape.num_heads, shape.head_dim), generator=generator).bfloat16()


def expected_rows(query: Tensor, pages: Pages, run: TokenRun, window: int) -> Tensor:
    """What the rows of a run [L, Hq, D] see: [L, Hq, D]."""
    group = query.shape[1] // pages.keys.shape[1]
    keys, values = (part[slots_of(run)].repeat_interleave(group, dim=1) for part in (pages.keys, pages.values))
    positions = run.start + torch.arange(len(run.token_ids)).unsqueeze(1)
    others = torch.arange(len(keys))
    is_seen = (others <= positions) & (others > positions - (window or len(keys)))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) / query.shape[2] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~is_seen, -torch.inf).softmax(dim=-1), values)


def check(shape: AttentionShape, spans: list[tuple[int, int]], *, window: int = 0, is_int8: bool = False) -> None:
    """Each head of each row of a step comes out as expected."""
    runs = make_runs(spans)
    pages = make_pages(shape, runs, is_int8=is_int8)
    layout = lay_out(runs, BLOCK_SIZE, tile_tokens(shape.num_heads // shape.num_kv_heads))
    inputs = transfer(layout, torch.device("cpu"))
    query = make_query(shape, inputs)

    found = attend(query, pages.layer, inputs, shape, window=window)

    found = found.view_as(query).double()
    for run, first in zip(runs, layout.rows, strict=True):
        rows = slice(first, first + len(run.token_ids))
        expected = expected_rows(query[rows], pages, run, window)
        errors = (found[rows] - expected).norm(dim=2) / expected.norm(dim=2)
        assert float(errors.max()) < MAX_ERROR, (run.start, len(run.token_ids))


@pytest.mark.parametrize("is_int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("window", [0, 20, 270])
def test_chunks_and_single_tokens_see_their_own_sequence_over_all_splits(window: int, is_int8: bool) -> None:
    check(AttentionShape(4, 2, 16), MIXED, window=window, is_int8=is_int8)


@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_query_heads_share_key_heads(group: int) -> None:
    check(AttentionShape(2 * group, 2, 24), SHORT)


@pytest.mark.parametrize("is_int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("head_dim", [16, 24, 80])
def test_heads_of_any_size(head_dim: int, is_int8: bool) -> None:
    check(AttentionShape(2, 1, head_dim), SHORT, is_int8=is_int8)


def test_a_chunk_of_more_tokens_than_a_tile_has() -> None:
    assert tile_tokens(7) == 18
    check(AttentionShape(7, 1, 16), [(250, 40), (3, 19)])


def test_a_group_of_more_heads_than_the_narrowest_tile_has_rows() -> None:
    check(AttentionShape(20, 1, 16), [(70, 1), (0, 9)])


@pytest.mark.parametrize("window", [0, 20])
def test_splits_beyond_a_context_change_nothing(window: int) -> None:
    shape = AttentionShape(4, 2, 16)
    runs = make_runs([(0, 1), (300, 1)])
    pages = make_pages(shape, runs)
    inputs = transfer(lay_out(runs, BLOCK_SIZE, 1), torch.device("cpu"))
    query = make_query(shape, inputs)
    wider = transfer(lay_out_singles(runs, BLOCK_SIZE, TableRows(len(runs), 64)), torch.device("cpu"))

    plain, captured = (
        attend(query, pages.layer, step, shape, window=window) for step in (inputs, wider._replace(max_context=1024))
    )

    assert torch.equal(plain, captured)


@pytest.mark.parametrize("is_int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("window", [1, 20, 270])
@pytest.mark.parametrize("span", [(300, 1), (290, 20)], ids=["single token", "chunk"])
def test_positions_before_all_windows_may_hold_anything(span: tuple[int, int], window: int, is_int8: bool) -> None:
    shape, runs = AttentionShape(4, 2, 16), make_runs([span])
    pages = make_pages(shape, runs, is_int8=is_int8)
    inputs = transfer(lay_out(runs, BLOCK_SIZE, tile_tokens(2)), torch.device("cpu"))
    query = make_query(shape, inputs)
    expected = attend(query, pages.layer, inputs, shape, window=window)

    hidden = slots_of(runs[0])[: span[0] - window + 1]
    layer = pages.layer
    for part in (layer.key_scales, layer.value_scales) if is_int8 else (layer.keys, layer.values):
        assert part is not None
        part.flatten(0, 1)[hidden] = torch.nan

    assert torch.equal(attend(query, layer, inputs, shape, window=window), expected)


def test_a_split_is_longer_for_models_of_long_contexts() -> None:
    lengths = (40, 16_384, 16_385, 131_072)
    shapes = [AttentionShape.of(PLAIN_CONFIG, length, shared_memory=2**18) for length in lengths]

    assert [shape.split for shape in shapes] == [256, 256, 512, 2048]


@pytest.mark.parametrize(
    ("head_dim", "shared_memory", "keys"), [(128, 101_376, 64), (256, 101_376, 32), (256, 166_912, 64), (192, 0, 32)]
)
def test_a_tile_has_fewer_keys_where_large_heads_would_not_fit_the_card(
    head_dim: int, shared_memory: int, keys: int
) -> None:
    config = msgspec.structs.replace(PLAIN_CONFIG, head_dim=head_dim)

    assert AttentionShape.of(config, 4096, shared_memory).keys == keys


@pytest.mark.parametrize("is_int8", [False, True], ids=["bfloat16", "int8"])
def test_small_tiles_see_the_same(is_int8: bool) -> None:
    check(AttentionShape(4, 2, 16, keys=32, stages=1), MIXED, window=270, is_int8=is_int8)

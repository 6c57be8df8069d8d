"""What ranks do together in processes of their own, by gloo on loopback."""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from typing import Any

import torch

from brlite.backends.torch.group import TorchGroup
from brlite.models.shards import Shard
from tests.limits import PATIENCE_SECONDS

SIZE, NUM_ROWS, NUM_COLUMNS = 3, 9, 700  # of three numbers the sum depends on the order
HOST = "127.0.0.1"


def rows_of(rank: int) -> torch.Tensor:
    return torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(rank))


def be_rank(rank: int, places: Queue[str], found: Queue[list[Any]]) -> None:
    """Sum all rows at once, each by itself, and some together, and say what came out."""
    group = TorchGroup(Shard(rank, SIZE), torch.device("cpu"))
    place = group.open(HOST) if rank == 0 else places.get(timeout=PATIENCE_SECONDS)
    for _ in range(SIZE - 1 if rank == 0 else 0):
        places.put(place)
    group.join(place)
    rows = rows_of(rank)
    alone = torch.cat([group.sum_(row.clone().unsqueeze(0)) for row in rows])
    some = group.sum_(rows[2:7].clone())
    found.put([group.sum_(rows.clone()).numpy(), alone.numpy(), some.numpy()])
    group.sum_(torch.zeros(1))  # nobody leaves before
    group.close()


def test_a_row_is_summed_to_the_same_bits_in_any_company_and_on_each_rank() -> None:
    context = multiprocessing.get_context("spawn")
    places, found = context.Queue(), context.Queue()
    others = [context.Process(target=be_rank, args=(rank, places, found), daemon=True) for rank in range(1, SIZE)]
    for rank in others:
        rank.start()
    expected = (rows_of(0) + rows_of(1)) + rows_of(2)

    be_rank(0, places, found)  # in this process, as in a server
    answers = [found.get(timeout=PATIENCE_SECONDS) for _ in range(SIZE)]

    for rank in others:
        rank.join(PATIENCE_SECONDS)
    for together, alone, some in answers:
        assert torch.equal(torch.from_numpy(together), expected)
        assert torch.equal(torch.from_numpy(alone), expected)
        assert torch.equal(torch.from_numpy(some), expected[2:7])

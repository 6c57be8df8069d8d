"""Ranks on torch against one: every family, split in two and in four. The ranks are threads, and so is their group."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from brlite.backends.torch.loading import load_model
from brlite.config.options import ModelSpec
from brlite.errors import ConfigError
from brlite.models.precision import PrecisionName
from brlite.models.shards import Shard, check_groups
from tests.limits import PATIENCE_SECONDS
from tests.load_plans import make_plan
from tests.models.steps import BLOCK_SIZE, DEVICE, LENGTH, Runner, load_tiny, random_ids
from tests.tiny_models import TINY_CONFIGS, TensorCheckpoint

BLOCKS = list(range(2 * LENGTH // BLOCK_SIZE, 0, -2))
TOLERANCE = 1e-5
SIZES = [2, 4]


class Table:
    """Where threads lay down what the others take. They go two rounds: nobody clears the table while others look."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=PATIENCE_SECONDS)
        self._laid: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self._laid[rank] = tensor.clone()
        self._barrier.wait()
        found = [tensor for tensor in self._laid if tensor is not None]
        self._barrier.wait()
        return found


class ThreadGroup:
    """A `Group`."""

    def __init__(self, table: Table, rank: int) -> None:
        self._table = table
        self._rank = rank

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._table.exchange(self._rank, tensor)).sum(dim=0))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return self._table.exchange(self._rank, tensor)


def logits_of_ranks(name: str, size: int, token_ids: Sequence[int], precision: PrecisionName = "bf16") -> list[Tensor]:
    """What each rank says of a prompt in two chunks."""
    table, spec = Table(size), ModelSpec(name=name, build_seq=LENGTH, precision=precision)

    def run(rank: int) -> Tensor:
        plan = make_plan(TensorCheckpoint.tiny(name), spec, shard=Shard(rank, size))
        decoder = load_model(plan, torch.float32, DEVICE, group=ThreadGroup(table, rank))
        return Runner(decoder).chunked(list(token_ids), BLOCKS, [LENGTH - 7, 7])

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_ranks_say_what_one_says(name: str, size: int) -> None:
    token_ids = random_ids()
    expected = Runner(load_tiny(name)).whole(token_ids, BLOCKS)

    for logits in logits_of_ranks(name, size, token_ids):
        assert logits.shape == expected.shape  # 300 tokens are not four equal parts of whole lanes
        assert (logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "llama-tied", "baichuan", "phi3"])
def test_int8_weights_are_rounded_before_they_are_split(name: str) -> None:
    token_ids = random_ids()
    expected = Runner(load_tiny(name, "a_bf16_w_int8")).whole(token_ids, BLOCKS)

    for logits in logits_of_ranks(name, 2, token_ids, "a_bf16_w_int8"):
        assert (logits - expected).abs().max() <= TOLERANCE


def test_a_split_inside_a_group_of_int8_weights_is_refused() -> None:
    config = load_tiny("llama-head-dim").config  # heads of 24: the second begins inside a group of 32

    check_groups(config, 1)
    with pytest.raises(ConfigError, match=r"tensor_parallel is 4: rank 1's inputs of o\.weight begin at 24, inside"):
        check_groups(config, 4)

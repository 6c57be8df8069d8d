"""NUMA nodes: which CPUs a rank gets, and where weights are moved. Machines with one node, as most are, have node 0."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from brlite.backends.native import nodes
from brlite.backends.native.nodes import STRIPE_BYTES, BoundThread, move_memory, place_weights, rank_cpus
from brlite.models.shards import Shard
from brlite.process.machine import show_bytes

NUM_BYTES = 40 * mmap.PAGESIZE
NO_NODE = NO_CPU = 1023
ON_NODE_0 = f"weights: {show_bytes(NUM_BYTES // 2)} on NUMA node 0"


@pytest.mark.parametrize(
    ("cpus_of_nodes", "num_threads", "expected"),
    [
        ([4, 4], 4, [[0], [1]]),
        ([4, 4, 4, 4], 8, [[0, 1], [2, 3]]),
        ([4, 4], 2, [[0], [0], [1], [1]]),
        ([4, 4], 2, [[0], [], [1]]),  # the second of three would have both
        ([4, 0, 4], 4, [[0], [2]]),  # a node of memory alone, or with CPUs of other programs
        ([4, 2], 3, [[0], []]),  # too few CPUs
        ([4, 0], 2, [[], []]),
        ([], 2, [[], []]),
    ],
)
def test_ranks_divide_the_nodes(cpus_of_nodes: list[int], num_threads: int, expected: list[list[int]]) -> None:
    machine = {node: frozenset(range(10 * node, 10 * node + num)) for node, num in enumerate(cpus_of_nodes)}

    found = [rank_cpus(Shard(rank, len(expected)), num_threads, machine) for rank in range(len(expected))]

    assert found == [frozenset[int]().union(*(machine[node] for node in own)) for own in expected]


def test_a_bound_thread_binds_the_threads_that_it_starts() -> None:
    before = os.sched_getaffinity(0)
    cpu = min(before)

    with ThreadPoolExecutor(1) as pool:
        with BoundThread({cpu}):
            inside = os.sched_getaffinity(0), pool.submit(os.sched_getaffinity, 0).result()
        kept = pool.submit(os.sched_getaffinity, 0).result()

    assert inside == ({cpu}, {cpu})
    assert kept == {cpu}
    assert os.sched_getaffinity(0) == before


def test_a_thread_that_may_not_be_bound_runs_on_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As after a change of a container's cpuset: the CPUs that a rank was bound to are no longer its own."""
    before = os.sched_getaffinity(0)
    binding = BoundThread({NO_CPU})

    for _ in range(2):
        with binding:
            assert os.sched_getaffinity(0) == before

    (record,) = caplog.records
    assert "cannot be bound to those of its NUMA nodes: Invalid argument" in record.message


def test_a_thread_whose_former_cpus_are_gone_is_left_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = BoundThread(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {NO_CPU})

    with binding:
        pass


@pytest.fixture
def address() -> Iterator[int]:
    """Of memory in which some pages were not touched."""
    memory = mmap.mmap(-1, NUM_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[: NUM_BYTES // 2] = b"x" * (NUM_BYTES // 2)
    view = ctypes.c_char.from_buffer(memory)
    try:
        move_memory(ctypes.addressof(view), NUM_BYTES, [0])
    except OSError as error:
        pytest.skip(f"this system moves no memory: {error}")
    yield ctypes.addressof(view)
    del view


def test_memory_that_is_moved_keeps_its_bytes(address: int) -> None:
    found = move_memory(address, NUM_BYTES, [0])

    assert found == ({0: NUM_BYTES // 2}, 0)  # what was not touched is nowhere
    assert ctypes.string_at(address, NUM_BYTES) == b"x" * (NUM_BYTES // 2) + bytes(NUM_BYTES // 2)


@pytest.mark.parametrize(
    ("machine", "policy", "level", "text"),
    [
        ({}, (nodes.DEFAULT, ()), None, ""),
        ({0: {0}, NO_NODE: set()}, (nodes.DEFAULT, ()), "INFO", ON_NODE_0),
        ({0: {0}, NO_NODE: {1}}, (nodes.BIND, {0}), "INFO", ON_NODE_0),
        ({0: set(), NO_NODE: {1}}, (nodes.INTERLEAVE, {0}), "INFO", ON_NODE_0),
        ({0: {0}, NO_NODE: {1}}, (1, {0}), "INFO", "the memory policy of this process"),  # preferred
        (
            {0: set(), NO_NODE: {0}},
            (nodes.LOCAL, ()),
            "WARNING",
            "not spread over NUMA nodes 0 and 1023: No such device\n",
        ),
    ],
)
def test_what_becomes_of_weights_is_logged(
    machine: dict[int, set[int]],
    policy: tuple[int, set[int]],
    level: str | None,
    text: str,
    address: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(nodes, "find_nodes", lambda: machine)
    monkeypatch.setattr(nodes, "_memory_policy", lambda: policy)
    caplog.set_level(logging.INFO)

    place_weights(address, NUM_BYTES)

    assert [record.levelname for record in caplog.records] == ([level] if level else [])
    assert text in caplog.text


class TwoNodes:
    """A machine with two nodes. Pages lie on node 0 until they are moved; `stuck` ones cannot be."""

    def __init__(self) -> None:
        self.stuck: set[int] = set()
        self._lie: dict[int, int] = {}

    def move_pages(self, pages: npt.NDArray[np.uint64], wanted: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32]:
        if wanted is not None:
            for page, node in zip(pages.tolist(), wanted.tolist(), strict=True):
                if page in self.stuck:
                    break  # as the system does
                self._lie[page] = node
        return np.array([self._lie.get(page, 0) for page in pages.tolist()], np.int32)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    machine = TwoNodes()
    monkeypatch.setattr(nodes, "find_nodes", lambda: {0: {0}, 1: {1}})
    monkeypatch.setattr(nodes, "_memory_policy", lambda: (nodes.DEFAULT, frozenset()))
    monkeypatch.setattr(nodes, "_move_pages", machine.move_pages)
    return machine


@pytest.fixture(scope="module")
def weights() -> Iterator[int]:
    """The address of 20 MB, in the second page of a stripe on node 0."""
    memory = mmap.mmap(-1, 6 * 2 * STRIPE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(memory)
    yield -(-ctypes.addressof(view) // (2 * STRIPE_BYTES)) * 2 * STRIPE_BYTES + mmap.PAGESIZE
    del view


@pytest.mark.parametrize(
    ("num_bytes", "is_stuck", "level", "text"),
    [
        (300_000, False, "INFO", "weights: 303 kB on NUMA node 0"),  # less than a stripe
        (20_000_000, False, "INFO", "weights: 10.5 MB on NUMA node 0, 9.52 MB on NUMA node 1"),
        (20_000_000, True, "WARNING", "20 MB on NUMA node 0, and 9.52 MB not on nodes 0 and 1 in turn: there is no"),
    ],
)
def test_weights_lie_on_two_nodes_in_turn(
    two_nodes: TwoNodes,
    weights: int,
    num_bytes: int,
    is_stuck: bool,
    level: str,
    text: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    two_nodes.stuck = {weights} if is_stuck else set()
    caplog.set_level(logging.INFO)

    place_weights(weights, num_bytes)

    (record,) = caplog.records
    assert record.levelname == level
    assert text in record.message


def test_a_container_that_may_not_move_memory_is_told_what_it_needs(
    two_nodes: TwoNodes, weights: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(nodes, "_move_pages", refuse)

    place_weights(weights, 5_000_000)

    assert "nodes 0 and 1: Operation not permitted; a container needs the capability SYS_NICE" in caplog.text

"""NUMA nodes: which CPUs a rank gets, and where weights are moved. Machines with one node, as most are, have node 0."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from brlite.backends.native import nodes
from brlite.backends.native.nodes import BoundThread, move_memory, place_weights, rank_cpus
from brlite.models.shards import Shard
from brlite.process.machine import show_bytes

NUM_BYTES = 40 * mmap.PAGESIZE
NO_NODE = 1023
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

    assert found == {0: NUM_BYTES // 2}  # what was not touched is nowhere
    assert ctypes.string_at(address, NUM_BYTES) == b"x" * (NUM_BYTES // 2) + bytes(NUM_BYTES // 2)


@pytest.mark.parametrize(
    ("machine", "policy", "level", "text"),
    [
        ({}, (nodes.DEFAULT, ()), None, ""),
        ({0: {0}, NO_NODE: set()}, (nodes.DEFAULT, ()), "INFO", ON_NODE_0),
        ({0: {0}, NO_NODE: {1}}, (nodes.BIND, {0}), "INFO", ON_NODE_0),
        ({0: set(), NO_NODE: {1}}, (nodes.INTERLEAVE, {0}), "INFO", ON_NODE_0),
        ({0: {0}, NO_NODE: {1}}, (1, {0}), "INFO", "the memory policy of this process"),  # preferred
        ({0: set(), NO_NODE: {0}}, (nodes.LOCAL, ()), "WARNING", "not spread over NUMA nodes 0 and 1023: No such"),
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


def test_weights_that_could_not_be_moved_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nodes, "find_nodes", lambda: {0: {0}, 1: {1}})
    monkeypatch.setattr(nodes, "_memory_policy", lambda: (nodes.DEFAULT, frozenset()))
    monkeypatch.setattr(nodes, "move_memory", lambda *arguments: {0: 4_000_000_000, 1: 1_000_000_000})

    place_weights(0, 5_000_000_000)

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "4 GB on NUMA node 0, 1 GB on NUMA node 1, and not as much as possible on nodes 0 and 1" in record.message

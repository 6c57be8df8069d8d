"""NUMA nodes: where the weights lie, and which CPUs the threads of a rank use, on a machine with several nodes.

Weights lie on the nodes whose CPUs compute with them, in turn. Each rank of a model has nodes of its own, so that it
reads local memory only. The nodes of a memory policy that the process was started with (`numactl`) are kept to. On a
machine with one node nothing is done.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from brlite.models.shards import Shard
from brlite.process.machine import find_nodes, show_bytes

logger = logging.getLogger(__name__)

STRIPE_BYTES = 2**21  # on one node: a huge page
MOVED_BYTES = 2**26  # by one call: the system ends a call at the first page that it cannot move
# The system calls move_pages and get_mempolicy, which the C library does not have.
CALLS = {"x86_64": (279, 239), "aarch64": (239, 236)}
MAX_ELSEWHERE = 0.25  # of the weights, without a warning
MOVE = 2  # MPOL_MF_MOVE: only pages that no other process maps
DEFAULT, BIND, INTERLEAVE, LOCAL = 0, 2, 3, 4  # memory policies
POLICY_FLAGS = 0b111 << 13
MAX_NODES = 1024


class BoundThread:
    """In a `with` block the calling thread runs on `cpus` only, and so do threads that it starts there, for good.

    Where the system does not allow that, as after a change of the container's cpuset, the thread runs on any CPU from
    then on. The log says so once.
    """

    def __init__(self, cpus: Collection[int]) -> None:
        self._cpus = cpus  # empty: it is not bound any more
        self._before: Collection[int] = ()

    def __enter__(self) -> None:
        if not self._cpus:
            return
        self._before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, self._cpus)
        except OSError as error:
            logger.warning(
                "a rank's thread runs on any CPU, for it cannot be bound to those of its NUMA nodes: %s", error.strerror
            )
            self._cpus = ()

    def __exit__(self, *exception: object) -> None:
        if self._cpus:
            with suppress(OSError):  # none of them is allowed any more: the system has chosen others
                os.sched_setaffinity(0, self._before)


def rank_cpus(shard: Shard, num_threads: int, nodes: Mapping[int, Collection[int]]) -> frozenset[int]:
    """The CPUs of the nodes that are a rank's own. Empty if its threads are not to be bound to any.

    `nodes` are those of `find_nodes`. Ranks share a node where their numbers do not divide evenly.
    """
    computing = [node for node, cpus in nodes.items() if cpus]
    first, end = shard.rank * len(computing) // shard.size, -(-(shard.rank + 1) * len(computing) // shard.size)
    own = computing[first:end]
    if own == computing:
        return frozenset()
    cpus = frozenset(cpu for node in own for cpu in nodes[node])
    found = f"rank {shard.rank} of {shard.size}: {num_threads} threads, NUMA {show_nodes(own)} with {len(cpus)} CPUs"
    if len(cpus) < num_threads:
        logger.warning("%s: too few, so its threads run on any node", found)
        return frozenset()
    logger.info("%s, to which its threads are bound", found)
    return cpus


def place_weights(address: int, num_bytes: int) -> None:
    """Move weights to the nodes whose CPUs this thread may use, and log where they lie then."""
    if not (nodes := find_nodes()):
        return
    try:
        policy, allowed = _memory_policy()
        if policy not in (DEFAULT, BIND, INTERLEAVE, LOCAL):
            logger.info("the weights lie on the NUMA nodes that the memory policy of this process gives them (numactl)")
            return
        usable = [node for node in nodes if policy in (DEFAULT, LOCAL) or node in allowed] or list(nodes)
        targets = [node for node in usable if nodes[node] or policy == INTERLEAVE] or usable
        found, num_elsewhere = move_memory(address, num_bytes, targets)
    except OSError as error:
        hint = "; a container needs the capability SYS_NICE for it" if error.errno == errno.EPERM else ""
        logger.warning("the weights are not spread over NUMA %s: %s%s", show_nodes(list(nodes)), error.strerror, hint)
        return
    lie = ", ".join(f"{show_bytes(found[node])} on NUMA node {node}" for node in sorted(found))
    if num_elsewhere > MAX_ELSEWHERE * sum(found.values()):
        where = f"{show_bytes(num_elsewhere)} not on {show_nodes(targets)} in turn"
        reason = "there is no room for more, or another process has them in memory"
        logger.warning("weights: %s, and %s: %s", lie, where, reason)
    else:
        logger.info("weights: %s", lie)


def move_memory(address: int, num_bytes: int, nodes: list[int]) -> tuple[dict[int, int], int]:
    """Move this process's memory to `nodes`, `STRIPE_BYTES` on each in turn.

    Returns node → bytes that lie there then, and how many of them were to lie elsewhere. Memory that was not touched
    yet does not count. Raises `OSError` where the system does not allow it.
    """
    # Linux 6.1 to 6.4 does not move pages that its own balancing of nodes watches, until they are read.
    np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))[:: mmap.PAGESIZE].max()
    in_turn, end = np.array(nodes, np.int32), address + num_bytes
    lie, num_elsewhere = Counter[int](), 0
    for first in range(address // mmap.PAGESIZE * mmap.PAGESIZE, end, MOVED_BYTES):
        pages = np.arange(first, min(end, first + MOVED_BYTES), mmap.PAGESIZE, dtype=np.uint64)
        wanted = in_turn[(pages // STRIPE_BYTES % len(nodes)).astype(np.intp)]
        _move_pages(pages, wanted)
        found = _move_pages(pages, None)
        num_elsewhere += mmap.PAGESIZE * int(np.count_nonzero((found != wanted) & (found >= 0)))
        for node, count in zip(*np.unique(found[found >= 0], return_counts=True), strict=True):
            lie[int(node)] += mmap.PAGESIZE * int(count)
    return dict(lie), num_elsewhere


def _move_pages(pages: npt.NDArray[np.uint64], nodes: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32]:
    """The status of each page: its node, or an error below 0. With `nodes` pages are moved there before."""
    status = np.full(len(pages), -1, np.int32)
    targets = None if nodes is None else nodes.ctypes.data_as(ctypes.c_void_p)
    places = pages.ctypes.data_as(ctypes.c_void_p), targets, status.ctypes.data_as(ctypes.c_void_p)
    _call(0, ctypes.c_int(0), ctypes.c_ulong(len(pages)), *places, ctypes.c_int(MOVE))
    return status


def _memory_policy() -> tuple[int, frozenset[int]]:
    """The policy by which this thread gets memory, and the nodes in it."""
    policy, mask = ctypes.c_int(), (ctypes.c_uint64 * (MAX_NODES // 64))()
    _call(1, ctypes.byref(policy), mask, ctypes.c_ulong(MAX_NODES), None, ctypes.c_ulong(0))
    nodes = frozenset(node for node in range(MAX_NODES) if mask[node // 64] >> node % 64 & 1)
    return policy.value & ~POLICY_FLAGS, nodes


def _call(index: int, *arguments: Any) -> None:
    """One of `CALLS`. Raises `OSError`."""
    numbers = CALLS.get(platform.machine())
    if numbers is None:
        raise OSError(0, f"not known for {platform.machine()}")
    if ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(numbers[index]), *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def show_nodes(nodes: list[int]) -> str:
    """`node 0`, `nodes 0 and 1`, `nodes 0, 1 and 2`."""
    *first, last = map(str, nodes)
    return f"nodes {', '.join(first)} and {last}" if first else f"node {last}"

"""The `Group` of ranks on torch, by torch.distributed. A process has one at a time.

`device.py` names the collectives of a device.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# torch documents the class, but does not export it as type checkers want.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from brlite.backends.torch.device import collectives_of, loopback_only, make_current
from brlite.errors import ConfigError, RankGone
from brlite.models.shards import Shard

logger = logging.getLogger(__name__)

MEETING_SECONDS = 300.0  # the longest wait for another rank; the end of a rank's process is noticed at once
JOIN_SECONDS = 60.0

__all__ = ["TCPStore", "TorchGroup", "open_store"]


def open_store(host: str, port: int, seconds: float, *, is_keeper: bool) -> TCPStore:
    """Start a store at an address (with `is_keeper`), or connect to one; port 0 is any free one. Raises `RuntimeError`.

    It runs as long as it is referenced. `get` waits for a value, and raises after `seconds`.
    """
    return TCPStore(host, port, is_master=is_keeper, wait_for_workers=False, timeout=timedelta(seconds=seconds))


class TorchGroup:
    """A `Group`. Rank 0 opens it, all ranks join it, and each closes it. It cannot communicate before `join`."""

    def __init__(self, shard: Shard, device: torch.device) -> None:
        if not dist.is_available():
            raise ConfigError("tensor_parallel needs torch.distributed, which this build of torch does not have")
        self._shard = shard
        self._device = device
        self._store: TCPStore | None = None
        self._is_joined = False

    def open(self, host: str) -> str:
        """Start the store through which the ranks connect, at an address of this machine. Returns its host and port."""
        self._store = open_store(host, 0, JOIN_SECONDS, is_keeper=True)
        return f"{host}|{self._store.port}"

    def join(self, place: str) -> None:
        """Connect to the other ranks. Raises `RankGone` if one does not connect in time."""
        host, _, port = place.rpartition("|")
        if dist.is_initialized():
            raise ConfigError("one model at a time can be shared by ranks on torch: another one is loaded already")
        make_current(self._device)
        try:
            if self._store is None:
                self._store = open_store(host, int(port), JOIN_SECONDS, is_keeper=False)
            with loopback_only(host):
                dist.init_process_group(
                    collectives_of(self._device),
                    store=self._store,
                    rank=self._shard.rank,
                    world_size=self._shard.size,
                    timeout=timedelta(seconds=MEETING_SECONDS),
                )
            self._is_joined = True
            self.sum_(torch.zeros(1, device=self._device))  # the first collective call makes the connections
        except RuntimeError as error:
            raise RankGone(f"rank {self._shard.rank} could not join the others: {error}") from error

    def sum_(self, tensor: Tensor) -> Tensor:
        """Each rank adds up all tensors itself: an all-reduce adds in an order that depends on their size, so the bits
        of a row would depend on the other rows."""
        first, *others = self.gather(tensor)
        tensor.copy_(first)
        for other in others:
            tensor += other
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self._shard.size)]
        try:
            dist.all_gather(parts, tensor)
        except RuntimeError as error:  # torch's class when a connection is closed
            raise RankGone(f"another rank ended during a step: {error}") from error
        return parts

    def abort(self) -> None:
        """End waits for other ranks on a card. On the CPU they end by themselves when the connection closes."""
        abort = getattr(dist.group.WORLD, "abort", None)  # the oldest supported torch lacks it
        if self._is_joined and abort is not None:
            with suppress(RuntimeError):  # some backends do not implement it
                abort()

    def close(self) -> None:
        """Disconnect. Ranks that wait for this one raise. May be called twice, and before `join`."""
        self._store = None
        if self._is_joined:
            self._is_joined = False
            dist.destroy_process_group()

"""torch's key-value store over TCP, by which ranks find each other."""

from __future__ import annotations

from datetime import timedelta

# torch documents the class, but does not export it as type checkers want.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["TCPStore", "open_store"]


def open_store(host: str, port: int, seconds: float, *, is_keeper: bool) -> TCPStore:
    """Keep a store at an address, or connect to one; port 0 takes a free one. Raises `RuntimeError`.

    It serves as long as whoever keeps it holds on to it. `get` waits for a value, and raises if none comes in time.
    """
    return TCPStore(host, port, is_master=is_keeper, wait_for_workers=False, timeout=timedelta(seconds=seconds))

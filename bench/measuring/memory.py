"""Resident memory of a process and all its descendants, read from Linux's /proc. Knows nothing of servers."""

from __future__ import annotations

from measuring.process_tree import PROC, process_tree
from msgspec import Struct


class Memory(Struct, frozen=True, kw_only=True):
    """Bytes: resident now, and the sum of each process's own peak since it began."""

    resident: int
    peak: int


def tree_memory(pid: int) -> Memory | None:
    """What the tree below `pid` holds; `None` where there is no /proc, or no such process any more."""
    statuses = [status for each in process_tree(pid) if (status := _status(each))]
    if not statuses:
        return None
    return Memory(
        resident=sum(_bytes(status, "VmRSS") for status in statuses),
        peak=sum(_bytes(status, "VmHWM") for status in statuses),
    )


def _status(pid: int) -> dict[str, str]:
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split(":", 1) for line in lines)


def _bytes(status: dict[str, str], field: str) -> int:
    return int(status.get(field, "0 kB").split()[0]) * 1024

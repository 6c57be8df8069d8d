"""The processes below one and the processor time they have had, read from Linux's /proc. Knows nothing of servers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def process_tree(pid: int) -> list[int]:
    """`pid` and all its descendants."""
    parents = {int(folder.name): _parent(folder) for folder in PROC.glob("[0-9]*")}
    tree = [pid]
    for each in tree:  # grows while it is walked
        tree += [child for child, parent in parents.items() if parent == each]
    return tree


def processor_seconds(tree: list[int]) -> float:
    """What all threads of these processes have had since they began, user and system; those that ended do not count."""
    return sum(_nanoseconds(file) for pid in tree for file in PROC.glob(f"{pid}/task/*/schedstat")) / 1e9


def _parent(folder: Path) -> int | None:
    try:
        # The name in brackets may hold anything; state and parent follow the last bracket.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended meanwhile
        return None


def _nanoseconds(schedstat: Path) -> int:
    with suppress(OSError):  # it ended meanwhile
        return int(schedstat.read_text().split()[0])
    return 0

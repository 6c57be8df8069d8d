"""The processes below one and the processor time they have had, read from Linux's /proc. Knows nothing of servers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from msgspec import Struct

PROC = Path("/proc")


class Times(Struct, frozen=True):
    """Seconds since the processes began: that they ran, user and system, and that they waited for a core to run on."""

    ran: float
    waited: float

    def since(self, before: Times) -> Times:
        return Times(self.ran - before.ran, self.waited - before.waited)


def process_tree(pid: int) -> list[int]:
    """`pid` and all its descendants."""
    parents = {int(folder.name): _parent(folder) for folder in PROC.glob("[0-9]*")}
    tree = [pid]
    for each in tree:  # grows while it is walked
        tree += [child for child, parent in parents.items() if parent == each]
    return tree


def processor_times(tree: list[int]) -> Times:
    """Of all threads that these processes have; those that have ended do not count."""
    times = [_nanoseconds(file) for pid in tree for file in PROC.glob(f"{pid}/task/*/schedstat")]
    return Times(sum(ran for ran, _ in times) / 1e9, sum(waited for _, waited in times) / 1e9)


def _parent(folder: Path) -> int | None:
    try:
        # The name in brackets may hold anything; state and parent follow the last bracket.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended meanwhile
        return None


def _nanoseconds(schedstat: Path) -> tuple[int, int]:
    with suppress(OSError):  # it ended meanwhile
        ran, waited, _ = schedstat.read_text().split()
        return int(ran), int(waited)
    return 0, 0

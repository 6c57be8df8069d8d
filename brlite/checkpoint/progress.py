"""How far a long piece of work has come: a callback, a bar on a terminal, and a watcher of a folder that grows.

Knows nothing of models. A callback may be called from another thread and must return at once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

OnProgress = Callable[[str, float], None]  # (what is being done, how much of it is done: 0 to 1)

POLL_SECONDS = 0.2


class Progress(NamedTuple):
    """Where a piece of work reports how much of the current `stage` is done, if there is a callback for it."""

    on_progress: OnProgress | None = None
    stage: str = ""

    def report(self, fraction: float) -> None:
        if self.on_progress is not None:
            self.on_progress(self.stage, fraction)


def ignore_progress(stage: str, fraction: float) -> None:
    """For callers who do not want to know."""


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A callback that draws a bar on stderr if that is a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=1.0, file=sys.stderr, disable=None, bar_format=layout, leave=False) as bar:

        def show(stage: str, fraction: float) -> None:
            bar.set_description_str(stage, refresh=False)
            bar.update(fraction - bar.n)

        yield show


@contextmanager
def byte_bar(num_bytes: int, stage: str) -> Iterator[Callable[[int], None]]:
    """A callback for so many more bytes that are done, from any thread: rate and time left on a terminal."""
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(
        total=num_bytes, desc=stage, unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False
    ) as bar:

        def add(num_more: int) -> None:
            with lock:
                bar.update(num_more)

        yield add


@contextmanager
def growth_reported(folder: Path, num_bytes: int, stage: str, on_progress: OnProgress) -> Iterator[None]:
    """While the body runs, report the size of `folder` as a fraction of `num_bytes`; 1.0 once the body has succeeded.

    Downloaders each have their own way of telling how far they are, and change it; they all write files.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            on_progress(stage, min(0.99, folder_bytes(folder) / max(1, num_bytes)))

    on_progress(stage, 0.0)
    watcher = threading.Thread(target=watch, name="brlite-fetch-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    on_progress(stage, 1.0)


def folder_bytes(folder: Path) -> int:
    """The size of the files below `folder`, links not followed. Files may come and go meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        try:
            status = file.lstat()
        except OSError:
            continue  # renamed or removed since it was listed
        total += status.st_size if file.is_file() and not file.is_symlink() else 0
    return total

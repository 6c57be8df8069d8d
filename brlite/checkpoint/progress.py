"""Progress of long work: a callback, a bar on a terminal, and a watcher of a folder that grows.

A callback may be called from any thread and must return at once.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from brlite.process.machine import show_bytes

OnProgress = Callable[[str, float], None]  # (the stage, the fraction of it that is done: 0 to 1)

POLL_SECONDS = 0.2
LINE_SECONDS = 10.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
SIZED_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


def ignore_progress(stage: str, fraction: float) -> None:
    """A callback that does nothing."""


class SizedStage(str):
    """A stage of `num_bytes` bytes, for which a rate can be shown."""

    num_bytes: int

    def __new__(cls, text: str, num_bytes: int) -> SizedStage:
        stage = super().__new__(cls, text)
        stage.num_bytes = num_bytes
        return stage


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A callback that draws a bar on stderr if that is a terminal: rate and time left where the bytes are known.

    Elsewhere a stage of known size prints a line every ten seconds.
    """
    if not sys.stderr.isatty():
        yield ProgressLines().show
        return
    from tqdm import tqdm

    with tqdm(total=1.0, file=sys.stderr, bar_format=BAR, leave=False) as bar:
        lock = threading.Lock()

        def show(stage: str, fraction: float) -> None:
            with lock:
                if isinstance(stage, SizedStage):
                    unit, total, bar.bar_format = "B", float(stage.num_bytes), SIZED_BAR
                else:
                    unit, total, bar.bar_format = "", 1.0, BAR
                if (stage, total) != (bar.desc, bar.total):
                    bar.unit, bar.unit_scale = unit, bool(unit)
                    bar.reset(total)
                    bar.initial = bar.n = fraction * total  # so that the rate counts only what comes from now on
                    bar.set_description_str(stage, refresh=False)
                bar.update(fraction * total - bar.n)

        yield show


class ProgressLines:
    """Progress without a terminal: every `seconds`, a line about a stage of known size."""

    def __init__(self, seconds: float = LINE_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._stage = ""
        self._began = self._said = 0.0
        self._first = 0.0

    def show(self, stage: str, fraction: float) -> None:
        now = time.monotonic()
        with self._lock:
            if stage != self._stage:
                self._stage, self._began, self._said, self._first = stage, now, now, fraction
            if not isinstance(stage, SizedStage) or now < self._said + self._seconds:
                return
            self._said = now
        rate = (fraction - self._first) / (now - self._began)
        left = f", {(1 - fraction) / rate:.0f} s left" if rate > 0 else ""
        total = show_bytes(stage.num_bytes)
        print(
            f"brlite: {stage}: {fraction:.0%} of {total}, {show_bytes(rate * stage.num_bytes)}/s{left}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def byte_bar(num_bytes: int, stage: str) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal with rate and time left. Its callback takes the number of bytes just done, on any thread."""
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

    For downloaders that report no progress: they write files, too.
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

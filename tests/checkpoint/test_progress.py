"""Progress is told from nothing to all, and drawn on a terminal only."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from tqdm import tqdm

from brlite.checkpoint.progress import ProgressLines, SizedStage, folder_bytes, growth_reported, progress_bar
from brlite.process.streams import BarAwareHandler
from tests.limits import PATIENCE_SECONDS


def test_growth_is_seen_while_it_happens(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    half_was_seen = threading.Event()

    def note(stage: str, fraction: float) -> None:
        seen.append((stage, fraction))
        if fraction == 0.5:
            half_was_seen.set()

    with growth_reported(tmp_path, 1000, "copying", note):
        (tmp_path / "file").write_bytes(bytes(500))
        assert half_was_seen.wait(timeout=PATIENCE_SECONDS)

    assert seen[0] == ("copying", 0.0)
    assert seen[-1] == ("copying", 1.0)
    assert ("copying", 0.5) in seen


def test_what_failed_is_never_reported_as_done(tmp_path: Path) -> None:
    seen: list[float] = []

    with pytest.raises(OSError, match="cut off"), growth_reported(tmp_path, 10, "x", lambda _, f: seen.append(f)):
        raise OSError("cut off")

    assert 1.0 not in seen


def test_links_and_vanished_folders_have_no_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(7))
    (tmp_path / "link").symlink_to(tmp_path / "file")

    sizes = folder_bytes(tmp_path), folder_bytes(tmp_path / "absent")

    assert sizes == (7, 0)


def test_without_a_terminal_no_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as show:
        show("downloading", 0.5)
        show("downloading", 1.0)

    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_long_download_gets_lines_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = ProgressLines(seconds=0.01)

    for stage, fraction in (("loading", 0.0), (SizedStage("downloading x", 10**9), 0.0)):
        lines.show(stage, fraction)
    time.sleep(0.02)
    lines.show(SizedStage("downloading x", 10**9), 0.25)
    lines.show("loading", 0.5)

    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"brlite: downloading x: 25% of 1 GB, [\d.e+]+ [kMGT]B/s, \d+ s left", line)


def test_a_log_line_does_not_land_on_the_bars_line() -> None:
    stream = io.StringIO()
    handler = BarAwareHandler(stream)

    with tqdm(total=10, file=stream, desc="downloading", leave=False, mininterval=0.0) as bar:
        bar.update(5)
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 1, "a line of the log", None, None))

    line = next(line for line in stream.getvalue().split("\n") if "a line of the log" in line)
    assert line.rsplit("\r", 1)[-1] == "a line of the log"


def test_a_line_is_logged_while_another_thread_imports_the_library_of_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", ModuleType("tqdm"))
    stream = io.StringIO()

    BarAwareHandler(stream).emit(logging.LogRecord("x", logging.WARNING, "", 1, "a line of the log", None, None))

    assert stream.getvalue() == "a line of the log\n"

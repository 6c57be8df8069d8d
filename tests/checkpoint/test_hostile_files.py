"""Each hostile file is opened by a process of its own, which has little memory and time: it is refused in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.hostile_files import HOSTILE
from tests.warm import WarmPython

BYTES_BESIDE = 192 * 2**20  # for Python's own needs; the files have 8 MiB at most
CPU_SECONDS = 60
IMPORTS = """
import resource, sys
from pathlib import Path
import numpy, gguf
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.traced_checkpoint import TracedArchive
from brlite.config.options import ModelSpec
from brlite.errors import BrliteError
from brlite.checkpoint.checked_model import check_model
"""
OPENS = """
path, beside, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + beside, used + beside))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
try:
    if path.suffix == ".pt":
        TracedArchive(path).parameters()
    else:
        check_model(open_checkpoint(path), ModelSpec(name="m", build_seq=1))
except BrliteError as error:
    print("refused:", error)
else:
    print("opened")
"""


@pytest.fixture(scope="module")
def python() -> Iterator[WarmPython]:
    python = WarmPython(IMPORTS)
    yield python
    python.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_short_line_within_its_bounds(
    python: WarmPython, name: str, tmp_path: Path
) -> None:
    path = HOSTILE[name](tmp_path / "m")

    opened = python.run(OPENS, path, BYTES_BESIDE, CPU_SECONDS)

    assert opened.returncode == 0, opened.stderr[-2000:]
    (line,) = opened.stdout.splitlines()
    assert line.startswith("refused: ")
    assert len(line) < 800
    assert line.isprintable()

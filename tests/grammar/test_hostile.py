"""What kills or hangs other servers ends here as a refusal in under a second of CPU, while another request streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.grammar.hostile import cases
from tests.limits import PATIENCE_SECONDS


@pytest.fixture(scope="module")
def ends() -> dict[str, dict[str, Any]]:
    """What came of each case, in a process of its own: one that dies takes no other test with it."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.grammar.hostile"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_SECONDS,
    )
    ends = {end["case"]: end for end in map(json.loads, child.stdout.splitlines())}
    assert child.returncode == 0, (len(ends), child.returncode, child.stderr[-2000:])
    return ends


@pytest.mark.parametrize("name", [name for name, _ in cases()])
def test_it_is_refused_soon_and_other_streams_go_on(ends: dict[str, dict[str, Any]], name: str):
    end = ends[name]

    assert end["error"].startswith("structured: ")
    assert len(end["error"]) < 600
    assert end["seconds"] < 3  # of CPU, the other stream's included; 0.6 at most on an idle machine

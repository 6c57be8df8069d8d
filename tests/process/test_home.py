"""A home folder that cannot be used ends a command in one line and a status."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from brlite.files.cache import default_cache
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE


@pytest.mark.parametrize("command", [("doctor",), ("serve", "--port", "0")], ids=["doctor", "serve"])
def test_a_home_of_5000_letters_is_one_line(command: Sequence[str], tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("BRLITE_CACHE", "XDG_CACHE_HOME")}
    result = subprocess.run(
        [BRLITE, *command],
        env={**environment, "HOME": "/" + "x" * 5000},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )

    assert result.returncode in (0, 1, 2)
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("brlite: error")]) <= 1


def test_without_a_home_the_cache_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRLITE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BRLITE_CACHE", "~no-such-user-of-this-machine/cache")

    with pytest.raises(OSError, match="Set HOME or BRLITE_CACHE"):
        default_cache()

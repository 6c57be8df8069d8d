"""Ctrl-C at any moment of a command's start ends it without a traceback.

Before `brlite.__main__` runs, Python itself starts, and may print its own traceback. On a busy machine this takes
longer than the first of the moments here.
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE

COMMANDS = {
    "serve": ["serve", "--engine", "toy", "--model", "m", "--port", "0"],
    "proxy": ["proxy", "--upstream", "m=http://127.0.0.1:9", "--port", "0"],
    "doctor": ["doctor"],
    "help": ["--help"],
}


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.35, 0.6, 1.0])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_interrupted_start_is_quiet(command: list[str], seconds: float, tmp_path: Path) -> None:
    process = subprocess.Popen([BRLITE, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(seconds)  # not a limit: whatever the command does by then, it must end quietly

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)

    traceback = errors.partition(b"Traceback")[2]
    assert b"brlite/commands" not in traceback
    assert process.returncode in (0, 130, -signal.SIGINT) or traceback

"""`brlite chat` inside tmux: what stands on the screen of a real terminal, and which keys it understands."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, TOY

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

EMPTY_PROMPT = "\n>\n"


class Tmux:
    """A tmux server of its own, with one window of 80 × 24 characters."""

    def __init__(self, socket: Path, command: list[str]) -> None:
        self._socket = socket
        self("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", f"{shlex.join(command)}; sleep 600")

    def __call__(self, *arguments: str, typed: str | None = None) -> str:
        command = ["tmux", "-u", "-S", str(self._socket), *arguments]
        return subprocess.run(command, input=typed, capture_output=True, text=True, check=True).stdout

    def screen_with(self, text: str) -> str:
        """The screen, once it shows `text`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in (screen := self("capture-pane", "-p")):
            assert time.monotonic() < deadline, f"{text!r} never came: {screen}"
            time.sleep(0.05)
        return screen

    def type(self, *keys: str) -> None:
        """Press keys, once there is a prompt: before it the terminal itself shows what is typed."""
        self.screen_with(EMPTY_PROMPT)
        self("send-keys", *keys)


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    terminal = Tmux(tmp_path / "tmux", [BRLITE, "chat", *TOY, "--max-tokens", "6"])
    assert "/help shows the commands" in terminal.screen_with(EMPTY_PROMPT)
    yield terminal
    terminal("kill-server")


def test_keys_of_a_terminal_edit_the_line_and_its_history(tmux: Tmux) -> None:
    tmux.type("hello wrld", "Left", "Left", "Left", "o", "Enter")
    tmux.screen_with("[6 tokens")
    tmux.type("Up", "Home", "oh ")

    screen = tmux.screen_with("> oh hello world")
    assert "> hello world\n" in screen
    assert "^[" not in screen


def test_pasted_lines_and_wide_characters_stand_on_the_screen_as_one_message(tmux: Tmux) -> None:
    tmux("load-buffer", "-", typed="你好\nsecond line")
    tmux("paste-buffer", "-p")

    screen = tmux.screen_with("second line")
    assert "> 你好" in screen
    assert "tokens" not in screen  # nothing was asked yet

    tmux("send-keys", "Enter")
    assert tmux.screen_with("[6 tokens").count("[6 tokens") == 1

"""A home folder that cannot be used ends a command in one line and a status."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from brlite.files.cache import default_cache, expand_home
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE

UNKNOWN_USER = 54321
AS_UNKNOWN_USER = ["unshare", "--user", f"--map-user={UNKNOWN_USER}"]
COMMANDS = {
    "serve": ["serve", "--port", "0"],
    "serve a model of the home": ["serve", "--port", "0", "--model", "~/model.gguf"],
    "check": ["check", "brlite.toml"],
    "inspect": ["inspect", "~/model.gguf"],
    "convert": ["convert", "--model_name", "m", "--model_dir", "~/m", "--output_dir", "out"],
}


def has_user_namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*AS_UNKNOWN_USER, "true"], capture_output=True).returncode == 0


def run(command: list[str], home: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without an entry in the system's table, with this HOME, or without one."""
    left_out = ("BRLITE_CACHE", "XDG_CACHE_HOME", "HOME", "USERNAME", "LOGNAME", "USER")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    (folder / "brlite.toml").write_text('[[model]]\nname = "m"\npath = "~/model.gguf"\n')
    return subprocess.run(
        [*AS_UNKNOWN_USER, BRLITE, *command],
        env=environment if home is None else environment | {"HOME": home},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


HOMES = ["cannot be searched", "is not set", "has 5,000 letters", "is a device"]
# Each command with one home, and each home with a command or two.
PAIRS = [(name, HOMES[index % 4]) for index, name in enumerate(COMMANDS)]


@pytest.fixture
def home(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    names = {"cannot be searched": str(locked / "home"), "is not set": None, "is a device": "/dev/null"}
    return names.get(request.param, "/" + "x" * 5000)


@pytest.mark.skipif(not has_user_namespaces(), reason="this machine allows no user namespaces")
@pytest.mark.parametrize(("command", "home"), PAIRS, indirect=["home"])
def test_a_home_that_cannot_be_used_is_one_line_and_a_status(command: str, home: str | None, tmp_path: Path) -> None:
    result = run(COMMANDS[command], home, tmp_path)

    assert result.returncode in (1, 2), result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("brlite: error")]) == 1


@pytest.mark.skipif(not has_user_namespaces(), reason="this machine allows no user namespaces")
@pytest.mark.parametrize("home", HOMES[:1], indirect=True)  # four seconds each: it tries torch
def test_doctor_shows_all_else_that_it_found(home: str | None, tmp_path: Path) -> None:
    result = run(["doctor"], home, tmp_path)

    assert "Traceback" not in result.stderr
    assert "instruction sets" in result.stdout
    assert result.stdout.count("\nmodel\n") == 1


@pytest.mark.parametrize("find", [default_cache, lambda: expand_home("~no-such-user-of-this-machine/cache")])
def test_without_a_home_the_error_says_what_to_set(find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRLITE_CACHE", "~no-such-user-of-this-machine/cache")

    with pytest.raises(OSError, match="Set HOME or BRLITE_CACHE"):
        find()

"""The man page and the completions that a build makes, for share/."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import Distribution

from brlite.commands.cli import command_parser
from brlite.commands.shared_files import BuildWithSharedFiles, man_page


def commands() -> list[str]:
    return [str(name) for action in command_parser()._actions for name in action.choices or ()]


def build(folder: Path) -> dict[str, Path]:
    """The files that a build makes, by where they are installed."""
    distribution = Distribution({"name": "brlite"})
    command = BuildWithSharedFiles(distribution)
    command.build_base = str(folder)
    command.ensure_finalized()
    command.run()
    return {
        f"{target}/{Path(file).name}": Path(file) for target, files in distribution.data_files or () for file in files
    }


def test_a_build_makes_the_man_page_and_the_completions(tmp_path: Path) -> None:
    files = build(tmp_path)

    assert files.pop("share/man/man1/brlite.1").read_text(encoding="utf-8") == man_page()
    assert set(files) == {"share/bash-completion/completions/brlite", "share/zsh/site-functions/_brlite"}
    assert all("engine-check" in file.read_text(encoding="utf-8") for file in files.values())


def test_a_build_without_the_packages_says_which_files_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "argparse_manpage.manpage", None)

    assert build(tmp_path) == {}

    assert "without man page and completions" in caplog.text


def test_the_man_page_has_every_command() -> None:
    page = man_page().replace("\\-", "-")

    assert "brlite - A compact asyncio server for large language models." in page
    assert all(f".SH COMMAND \\fI\\,'brlite {name}'" in page for name in commands())


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="Debian's mandoc is not installed")
def test_the_man_page_is_correct_roff(tmp_path: Path) -> None:
    (tmp_path / "brlite.1").write_text(man_page(), encoding="utf-8")

    checked = subprocess.run(["mandoc", "-T", "lint", "-W", "error", str(tmp_path / "brlite.1")], capture_output=True)
    shown = subprocess.run(["mandoc", str(tmp_path / "brlite.1")], capture_output=True, check=True)

    assert checked.returncode == 0, checked.stdout
    assert b"--port" in shown.stdout

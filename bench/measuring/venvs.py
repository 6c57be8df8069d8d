"""The venvs that peers live in, in the bench's cache folder (BRLITE_BENCH_CACHE, else ~/.cache/brlite/bench).

Made on first use, which needs the package index. Knows no peer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALL_SECONDS = 1800
TOOL_SECONDS = 300


class ToolError(Exception):
    """A command that prepares something failed or took too long."""


def cache_folder() -> Path:
    return Path(os.environ.get("BRLITE_BENCH_CACHE") or "~/.cache/brlite/bench").expanduser()


def find_venv(name: str, requirements: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """The Python of a venv that has `requirements` and not `unwanted`; made, or made anew when they change."""
    folder = cache_folder() / "venvs" / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    text = "\n".join((*requirements, *(f"not {package}" for package in unwanted)))
    if not (stamp.exists() and stamp.read_text() == text):
        print(f"installing {', '.join(requirements)} into {folder} …", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        run_tool([sys.executable, "-m", "venv", str(folder)], TOOL_SECONDS)
        run_tool([str(python), "-m", "pip", "install", "--quiet", *requirements], INSTALL_SECONDS)
        if unwanted:
            run_tool([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], TOOL_SECONDS)
        stamp.write_text(text)
    return python


def package_version(python: Path, package: str) -> str:
    return run_tool([str(python), "-c", f"import importlib.metadata as m; print(m.version({package!r}))"], TOOL_SECONDS)


def run_tool(command: Sequence[str], timeout_seconds: float) -> str:
    """What the command prints. Raises `ToolError` with the end of what it said if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=True)
    except subprocess.CalledProcessError as error:
        raise ToolError(f"{' '.join(command[:4])} … failed:\n{error.stderr[-2000:]}") from None
    except subprocess.TimeoutExpired:
        raise ToolError(f"{' '.join(command[:4])} … took longer than {timeout_seconds:g} s") from None
    return done.stdout.strip()

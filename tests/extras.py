"""Tests that need a package which only an extra installs. Without it their files are not collected, and are counted."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORT = re.compile(r"^(?:from|import) ([\w.]+)", re.MULTILINE)  # those in functions are indented
TEST = re.compile(r"^(?:async )?def test_", re.MULTILINE)
HAS_TORCH = find_spec("torch") is not None


def is_left_out(path: Path) -> bool:
    """Whether a test file cannot be imported here for want of torch."""
    return not HAS_TORCH and path.name.startswith("test_") and path.suffix == ".py" and imports_torch(path)


def num_tests(path: Path) -> int:
    """How many test functions a file has."""
    return len(TEST.findall(path.read_text(encoding="utf-8")))


@cache
def imports_torch(path: Path) -> bool:
    """Whether importing a file imports torch, by what it and the files of this repository that it imports say."""
    names = IMPORT.findall(path.read_text(encoding="utf-8"))
    if any(name.split(".")[0] == "torch" or name == "safetensors.torch" for name in names):
        return True
    files = (_file_of(name) for name in names if name.split(".")[0] in ("brlite", "tests"))
    return any(imports_torch(file) for file in files if file is not None and file != path)


def _file_of(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)

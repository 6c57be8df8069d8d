"""The bench's own programs in C++: compiled on first use into the bench's cache folder, anew when their sources change.

Knows nothing of what they do.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from measuring.venvs import TOOL_SECONDS, cache_folder, run_tool

from brlite.backends.native.build import find_compiler

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2")


def find_program(name: str) -> Path:
    """The program that `NAME.cpp` makes. Raises `ToolError`, or `NativeUnavailable` if there is no compiler."""
    source = SOURCES / f"{name}.cpp"
    program = cache_folder() / "programs" / f"{name}-{_fingerprint(source)}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_name(f"{program.name}.{os.getpid()}.part")
        run_tool([*find_compiler(), *FLAGS, "-o", str(unfinished), str(source)], TOOL_SECONDS)
        unfinished.replace(program)
    return program


def _fingerprint(source: Path) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in (source, *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

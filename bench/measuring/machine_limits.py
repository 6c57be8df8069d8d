"""This machine's limits, measured by the loops of `machine_limits.h`: memory reads and multiply-adds.

The header is compiled here, into the bench's cache, so that a bench of the torch path has its limits too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from measuring.venvs import ToolError, cache_folder, run_tool

HEADER = Path(__file__).parent / "machine_limits.h"
SOURCE = """
#include "machine_limits.h"
extern "C" double brlite_measure(int kind, int threads, double seconds) {
    return brlite::measure(kind, threads, seconds);
}
"""
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
COMPILE_SECONDS = 120
# As `MeasuredKind` numbers them.
KINDS = ("read", "fp32", "int16", "bf16", "int8")

Measure = Callable[[str, int, float], float]


def load_measure() -> Measure:
    """A function of kind, threads and seconds: bytes a second for `read`, multiply-adds a second for the others."""
    function = ctypes.CDLL(str(_library())).brlite_measure
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_double)
    function.restype = ctypes.c_double
    return lambda kind, threads, seconds: float(function(KINDS.index(kind), threads, seconds))


def _library() -> Path:
    digest = hashlib.sha256(HEADER.read_bytes() + SOURCE.encode()).hexdigest()[:16]
    library = cache_folder() / "limits" / f"limits-{digest}.so"
    if not library.exists():
        _compile(library)
    return library


def _compile(library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise ToolError("no C++ compiler was found; the limits are measured by C++ loops")
    library.parent.mkdir(parents=True, exist_ok=True)
    source = library.with_suffix(".cpp")
    source.write_text(SOURCE)
    unfinished = library.with_name(f"{library.name}.{os.getpid()}.part")
    run_tool([compiler, *FLAGS, f"-I{HEADER.parent}", str(source), "-o", str(unfinished)], COMPILE_SECONDS)
    unfinished.replace(library)

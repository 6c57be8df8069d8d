"""The machine that a bench runs on, in words, and whether it is busy with something else."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path

BUSY_LOAD = 0.5  # of a core, before anything is started


def describe() -> dict[str, object]:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load before": round(os.getloadavg()[0], 2),
        "Python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def warn_if_busy(machine: Mapping[str, object]) -> None:
    if float(str(machine["load before"])) > BUSY_LOAD:
        print("this machine is busy: ratios may hold, absolute numbers do not", file=sys.stderr)

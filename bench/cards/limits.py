"""What a card is, and the two rates that bound every step: copying its memory, and multiplying bfloat16 matrices.

Random numbers are multiplied: zeros give higher rates. Measured by the wall clock between two synchronisations.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from statistics import median
from typing import Any

import torch

REPEATS = 10
COPIED_BYTES = {"cpu": 2**27}  # 128 MiB on a CPU, 4 GiB on a card: more than its caches hold
MATRIX_SIZE = {"cpu": 256}


def describe(device: torch.device) -> dict[str, Any]:
    """Names, versions and sizes, as far as torch and the driver's own tool tell them."""
    found: dict[str, Any] = {"device": str(device), "torch": str(torch.__version__), "triton": _version("triton")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "free_bytes": torch.cuda.mem_get_info(device)[0],
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy within the device's memory, those read and those written both counted."""
    num_bytes = COPIED_BYTES.get(device.type, 2**32)
    source = torch.randint(0, 127, (num_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device)


def multiply_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large product of bfloat16 matrices: a multiply and an add are two."""
    size = MATRIX_SIZE.get(device.type, 8192)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = REPEATS, warm_ups: int = 2) -> float:
    """The median of some runs of `work`, after those that warm up; the device is waited for after each."""
    found = []
    for _ in range(warm_ups + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return median(found[warm_ups:])


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip() or None

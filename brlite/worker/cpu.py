"""The processor that computes: its cores, its name and its instructions, as the system tells them. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

FAST_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
CPU_INFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores() -> int:
    """How many cores this process may use: hyper-threads count once, a container's quota is kept."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), _cpu_quota() or len(cores)))


def describe_cpu() -> str:
    """A line for the log."""
    return f"{physical_cores()} cores, {next(iter(_cpu_info('model name')), 'unknown model')}"


def has_fast_bfloat16() -> bool:
    """Whether it multiplies bfloat16 numbers itself and need not emulate it."""
    return bool(frozenset(" ".join(_cpu_info("flags")).split()) & FAST_BFLOAT16_FLAGS)


def _core_of(cpu: int) -> tuple[str, str]:
    """Package and core of a logical CPU; on systems that do not say, each is a core of its own."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "", str(cpu)


def _cpu_quota() -> int | None:
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None


def _cpu_info(key: str) -> Iterable[str]:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key][:1]

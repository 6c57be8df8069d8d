"""What this machine has, as /proc tells it: instruction sets, memory. Cores and devices are the worker's business."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

# Those that decide which matrix code runs well, x86 and ARM.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of main memory, or of the container's share if that is less."""

    total: int
    available: int


def find_instruction_sets() -> tuple[str, ...]:
    return parse_instruction_sets(_read(CPUINFO))


def find_memory() -> Memory:
    return parse_meminfo(_read(MEMINFO), _read(CONTAINER_LIMIT))


def show_bytes(num_bytes: float) -> str:
    """`538 MB`, `1.21 GB`: three digits, powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def parse_instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that the first processor in /proc/cpuinfo has."""
    fields = _fields(cpuinfo.partition("\n\n")[0])
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return tuple(name for name in INSTRUCTION_SETS if name in flags)


def parse_meminfo(text: str, container_limit: str = "") -> Memory:
    """Read /proc/meminfo and the container's limit, a number of bytes or `max`. Without them the system is asked."""
    fields = _fields(text)
    if "MemTotal" not in fields:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(total=total, available=total)
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = int(container_limit) if container_limit.strip().isdigit() else total
    return Memory(total=min(total, limit), available=min(available, limit))


def _fields(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not every system has these files

"""What this machine is: processor, cores, instruction sets, memory. Reads /proc where there is one, and imports nothing
heavy. Accelerators are the worker's business.
"""

from __future__ import annotations

import os
import platform
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


class Processor(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the processor that this process may use."""

    name: str
    num_cores: int
    num_threads: int
    instruction_sets: tuple[str, ...]


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of main memory, or of the container's share if that is less."""

    total: int
    available: int


def find_processor() -> Processor:
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return parse_cpuinfo(_read(CPUINFO), frozenset(usable))


def find_memory() -> Memory:
    return parse_meminfo(_read(MEMINFO), _read(CONTAINER_LIMIT))


def parse_cpuinfo(text: str, usable: frozenset[int]) -> Processor:
    """Read /proc/cpuinfo, counting only the `usable` threads; a core is one however many threads share it."""
    threads = [_fields(block) for block in text.strip().split("\n\n")]
    threads = [fields for fields in threads if fields.get("processor") in {str(number) for number in usable}]
    cores = {(fields.get("physical id"), fields["core id"]) for fields in threads if "core id" in fields}
    first = threads[0] if threads else {}
    flags = (first.get("flags") or first.get("Features") or "").split()
    return Processor(
        name=first.get("model name") or platform.processor() or platform.machine(),
        num_cores=len(cores) or len(usable),
        num_threads=len(usable),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
    )


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

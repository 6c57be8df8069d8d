"""What this process may use of the machine: cores, memory, NUMA nodes, instruction sets, open files.

No other file reads these from the system. Uses no backend and no accelerator. Standard library only: the installation's
compiler run imports it too. Every function takes the root of a file tree, so that tests describe another machine as a
folder of small files.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

# The sets that decide which matrix code is fast, of x86 and ARM.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
FAST_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
ROOT = Path("/")
CGROUPS = "sys/fs/cgroup"  # where cgroups are if /proc/self/mountinfo lists none
OWN_DESCRIPTORS = 80  # open files of the process itself, and connections of probes beyond `max_connections`
# Some child programs try every number up to the limit. macOS refuses more than OPEN_MAX: its manual, setrlimit(2).
MAX_DESCRIPTORS = 10240 if sys.platform == "darwin" else 1024 * 1024
OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes spaces


class Cpus(NamedTuple):
    """How many threads can run at once without waiting for each other, and what sets that number."""

    num_threads: int
    decided_by: str


class Memory(NamedTuple):
    """Bytes that this process may use in all, and those free now. `decided_by` names a limit below the machine's."""

    total: int
    available: int
    decided_by: str = ""


class Limit(NamedTuple):
    """A limit in CPUs or bytes, and the file or setting that it comes from."""

    value: Fraction | int
    source: str


def find_cpus(root: Path = ROOT, affinity: frozenset[int] | None = None) -> Cpus:
    """The least of the physical cores, the cores in `affinity` (default: this process's), and every CPU quota.

    Quotas are those of the process's cgroup and of all cgroups above it, rounded down. The result is at least 1.
    """
    online = _numbers(_read(root / "sys/devices/system/cpu/online")) or frozenset(range(os.cpu_count() or 1))
    affinity = _affinity(online) if affinity is None else affinity
    cores = len({_core_of(cpu, root) for cpu in online})
    bound = len({_core_of(cpu, root) for cpu in affinity})
    candidates = [
        Cpus(cores, "one for each physical core"),
        Cpus(bound, f"one for each physical core of the {len(affinity)} CPUs that its affinity allows"),
        *(Cpus(int(value), f"a quota of {float(value):.3g} CPUs in {source}") for value, source in cpu_quotas(root)),
    ]
    num_threads, decided_by = min(candidates, key=lambda candidate: candidate.num_threads)
    return Cpus(max(1, num_threads), decided_by)


def find_nodes(root: Path = ROOT, affinity: frozenset[int] | None = None) -> dict[int, frozenset[int]]:
    """The NUMA nodes whose memory this process may use, each with those of its CPUs that are in `affinity`.

    `affinity` is by default the calling thread's. Empty on a machine with one node.
    """
    folder = root / "sys/devices/system/node"
    nodes = _numbers(_read(folder / "has_memory"))
    if len(nodes) < 2:
        return {}
    cpus = {node: _numbers(_read(folder / f"node{node}/cpulist")) for node in sorted(nodes)}
    affinity = _affinity(frozenset().union(*cpus.values())) if affinity is None else affinity
    allowed = _numbers(_fields(_read(root / "proc/self/status"), ":").get("Mems_allowed_list", "")) or nodes
    return {node: beside & affinity for node, beside in cpus.items() if node in allowed}


def physical_cores() -> int:
    """How many threads this process should compute with."""
    return find_cpus().num_threads


def find_memory(root: Path = ROOT) -> Memory:
    """The least of the machine's memory, every cgroup's limit on the way to the root, and RLIMIT_AS (`ulimit -v`)."""
    fields, page_size = _fields(_read(root / "proc/meminfo"), ":"), os.sysconf("SC_PAGE_SIZE")
    total = available = os.sysconf("SC_PHYS_PAGES") * page_size
    if "MemTotal" in fields:  # else there is no /proc
        total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    memory = Memory(total, available)
    limits = []  # each with how much of it is used
    for folder, version in _cgroups(root, "memory"):
        # Beyond memory.high the kernel slows the process down instead of ending it.
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        used = _read(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")).strip()
        for name in names:
            limit = _read(folder / name).strip()
            if not limit.isdecimal():
                continue
            stat = _fields(_read(folder / "memory.stat"), " ")
            cache = stat.get("inactive_file" if version == 2 else "total_inactive_file", "")  # can be dropped: is free
            num_used = max(0, int(used) - int(cache if cache.isdecimal() else 0)) if used.isdecimal() else 0
            limits.append((Limit(int(limit), _shown(folder / name, root)), num_used))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and root == ROOT:
        pages = _read(root / "proc/self/statm").split()
        limits.append((Limit(soft, "RLIMIT_AS (ulimit -v)"), int(pages[0]) * page_size if pages else 0))
    for bound, num_used in limits:
        available = max(0, min(memory.available, int(bound.value) - num_used))
        if bound.value < memory.total:
            memory = Memory(int(bound.value), available, bound.source)
        else:
            memory = memory._replace(available=available)
    return memory


def find_instruction_sets(root: Path = ROOT) -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that the first processor in /proc/cpuinfo has."""
    processor = _first_processor(root)
    flags = (processor.get("flags") or processor.get("Features") or "").split()
    return tuple(name for name in INSTRUCTION_SETS if name in flags)


def has_fast_bfloat16(root: Path = ROOT) -> bool:
    """Whether the processor multiplies bfloat16 numbers itself and need not emulate it."""
    return not FAST_BFLOAT16.isdisjoint(find_instruction_sets(root))


def describe_cpu() -> str:
    """A line for the log: `8 cores, Intel(R) Xeon(R) …`."""
    return f"{physical_cores()} cores, {_first_processor(ROOT).get('model name', 'unknown model')}"


def descriptor_limit() -> int:
    """How many files the process can have open, at most `MAX_DESCRIPTORS`: its hard limit."""
    if resource is None:
        return MAX_DESCRIPTORS
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to `descriptor_limit()`."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < descriptor_limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor_limit(), hard))


def show_bytes(num_bytes: float) -> str:
    """`538 MB`, `1.21 GB`: three digits, powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def cpu_quotas(root: Path = ROOT) -> list[Limit]:
    """The CPU quotas of the process's cgroup and of those above it, in cgroup v2 and v1."""
    quotas = []
    for folder, version in _cgroups(root, "cpu"):
        files = [folder / "cpu.max"] if version == 2 else [folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"]
        words = [word for file in files for word in _read(file).split()]
        if len(words) == 2 and all(map(str.isdecimal, words)) and int(words[1]):  # else "max", or -1: no quota
            quotas.append(Limit(Fraction(int(words[0]), int(words[1])), _shown(files[0], root)))
    return quotas


def _cgroups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of the process's own cgroup and of every one above it, each with its version of cgroups.

    A process has one cgroup in v2 and one in each hierarchy of v1. Parts of the path that a container does not show
    are left out: the walk ends at the mount point, which shows the container's own cgroup.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if (number, controllers) == ("0", "") else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        own = PurePosixPath(path)
        for top, mount in _mounts(root, controller, version):
            relative = own.relative_to(top) if own.is_relative_to(top) else own
            names = [name for name in relative.parts if name not in ("/", "..")]
            yield from ((mount.joinpath(*names[:depth]), version) for depth in range(len(names), -1, -1))


def _mounts(root: Path, controller: str, version: int) -> list[tuple[PurePosixPath, Path]]:
    """Where a hierarchy is mounted: the cgroup that the mount point shows, and the mount point."""
    mounts = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # 36 35 98:0 ROOT MOUNT_POINT rw,noatime master:1 - TYPE SOURCE OPTIONS
        place, _, kind = line.partition(" - ")
        top, point = (OCTAL.sub(lambda match: chr(int(match[1], 8)), word) for word in place.split()[3:5])
        name, *_, options = kind.split()
        is_wanted = name == "cgroup2" if version == 2 else name == "cgroup" and controller in options.split(",")
        if is_wanted and (root / point.lstrip("/")).is_dir():
            mounts.append((PurePosixPath(top), root / point.lstrip("/")))
    usual = root / CGROUPS if version == 2 else root / CGROUPS / controller
    return mounts or [(PurePosixPath("/"), usual)]


def _core_of(cpu: int, root: Path) -> tuple[str, str]:
    """Package and core of a logical CPU; if the system does not report them, each CPU is a core."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    package, core = (_read(topology / name).strip() for name in ("physical_package_id", "core_id"))
    return (package, core) if core else ("", str(cpu))


def _affinity(everything: frozenset[int]) -> frozenset[int]:
    """The CPUs that the calling thread may use; `everything` where the system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everything


def _numbers(text: str) -> frozenset[int]:
    """Those of a list such as `0-3,8`."""
    parts = (part.partition("-") for part in text.split(",") if part.strip()[:1].isdecimal())
    return frozenset(number for first, _, last in parts for number in range(int(first), int(last or first) + 1))


def _first_processor(root: Path) -> dict[str, str]:
    return _fields(_read(root / "proc/cpuinfo").partition("\n\n")[0], ":")


def _fields(text: str, separator: str) -> dict[str, str]:
    pairs = (line.partition(separator) for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _shown(file: Path, root: Path) -> str:
    return str(ROOT / file.relative_to(root))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not every system has these files

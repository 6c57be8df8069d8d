"""What the system says this process may use: other machines, each as a folder of small files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from brlite.process.machine import cpu_quotas, find_cpus, find_instruction_sets, find_memory, find_nodes, show_bytes

MEMINFO = "MemTotal:       8000000 kB\nMemFree:  1 kB\nMemAvailable:   5000000 kB\n"
MOUNT = "36 25 0:30 {top} {point} rw,relatime shared:1 - {kind} cgroup {options}\n"


def lay_out(root: Path, files: dict[str, str]) -> Path:
    """Write a machine of 8 CPUs, two for each core, with 8 GB, and `files`."""
    topology = {f"sys/devices/system/cpu/cpu{cpu}/topology/core_id": f"{cpu // 2}\n" for cpu in range(8)}
    online = {"sys/devices/system/cpu/online": "0-7\n", "proc/meminfo": MEMINFO}
    for name, content in {**online, **topology, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def mount(top: str, point: str, controller: str = "") -> str:
    kind, options = ("cgroup", f"rw,{controller}") if controller else ("cgroup2", "rw,nsdelegate")
    return MOUNT.format(top=top, point=point, kind=kind, options=options)


EVERYTHING = frozenset(range(8))
CGROUP = "sys/fs/cgroup"
QUOTAS: dict[str, tuple[dict[str, str], int, str]] = {
    "no quota": ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "max 100000\n"}, 4, "physical core"),
    "v2, a container of its own": (
        {"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "200000 100000\n"},
        2,
        "a quota of 2 CPUs in /sys/fs/cgroup/cpu.max",
    ),
    "v2, rounded down": ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "150000 100000\n"}, 1, "1.5 CPUs"),
    "v2, less than one": ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "50000 100000\n"}, 1, "0.5 CPUs"),
    "v2, more than there is": ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "765000 100000\n"}, 4, "core"),
    "v2, a service below a slice": (
        {
            "proc/self/cgroup": "0::/system.slice/llm.service\n",
            "proc/self/mountinfo": mount("/", "/sys/fs/cgroup"),
            f"{CGROUP}/system.slice/llm.service/cpu.max": "300000 100000\n",
        },
        3,
        "/sys/fs/cgroup/system.slice/llm.service/cpu.max",
    ),
    "v2, the slice above has less": (
        {
            "proc/self/cgroup": "0::/job/step/task\n",
            f"{CGROUP}/job/cpu.max": "100000 50000\n",
            f"{CGROUP}/job/step/cpu.max": "max 100000\n",
            f"{CGROUP}/job/step/task/cpu.max": "300000 100000\n",
        },
        2,
        "/sys/fs/cgroup/job/cpu.max",
    ),
    "v2, the host's path in a container": (
        {"proc/self/cgroup": "0::/../../kubepods/pod1\n", f"{CGROUP}/cpu.max": "100000 100000\n"},
        1,
        "/sys/fs/cgroup/cpu.max",
    ),
    "v1, a container": (
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
            "proc/self/mountinfo": mount("/docker/abc", "/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct"),
            f"{CGROUP}/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
            f"{CGROUP}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        2,
        "a quota of 2.5 CPUs in /sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us",
    ),
    "v1, the host's path that is not shown": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n",
            f"{CGROUP}/cpu/cpu.cfs_quota_us": "100000\n",
            f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n",
        },
        1,
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    ),
    "v1, no quota": (
        {
            "proc/self/cgroup": "4:cpu:/\n",
            f"{CGROUP}/cpu/cpu.cfs_quota_us": "-1\n",
            f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
        "physical core",
    ),
    "v1 for the CPUs, v2 beside it": (
        {
            "proc/self/cgroup": "4:cpu:/slurm/job\n0::/\n",
            "proc/self/mountinfo": mount("/", "/sys/fs/cgroup/cpu", "cpu") + mount("/", "/sys/fs/cgroup/unified"),
            f"{CGROUP}/unified/cgroup.procs": "1\n",
            f"{CGROUP}/cpu/slurm/job/cpu.cfs_quota_us": "300000\n",
            f"{CGROUP}/cpu/slurm/job/cpu.cfs_period_us": "100000\n",
        },
        3,
        "/sys/fs/cgroup/cpu/slurm/job/cpu.cfs_quota_us",
    ),
    "a mount point with a space": (
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": mount("/", "/my\\040groups"),
            "my groups/cpu.max": "100000 100000\n",
        },
        1,
        "/my groups/cpu.max",
    ),
    "nonsense": (
        {"proc/self/cgroup": "0::/\nhello\n::\n", f"{CGROUP}/cpu.max": "100000 0\n", "proc/self/mountinfo": ""},
        4,
        "physical core",
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_least_quota_on_the_way_to_the_root_counts_and_is_named(case, tmp_path):
    files, count, decided_by = QUOTAS[case]

    cpus = find_cpus(lay_out(tmp_path, files), EVERYTHING)

    assert cpus.num_threads == count
    assert decided_by in cpus.decided_by


def test_affinity_counts_where_it_allows_less(tmp_path):
    cpus = find_cpus(lay_out(tmp_path, {}), frozenset({0, 1, 2}))

    assert cpus.num_threads == 2
    assert "the 3 CPUs that its affinity allows" in cpus.decided_by


TWO_NODES = {
    "sys/devices/system/node/has_memory": "0-1\n",
    "sys/devices/system/node/node0/cpulist": "0-3\n",
    "sys/devices/system/node/node1/cpulist": "4-6,7\n",
}


@pytest.mark.parametrize(
    ("files", "affinity", "nodes"),
    [
        ({}, EVERYTHING, {}),
        ({"sys/devices/system/node/has_memory": "0\n"}, EVERYTHING, {}),
        (TWO_NODES, EVERYTHING, {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}),
        (TWO_NODES, frozenset({5, 6}), {0: set(), 1: {5, 6}}),
        ({**TWO_NODES, "proc/self/status": "Mems_allowed_list:\t1\n"}, EVERYTHING, {1: {4, 5, 6, 7}}),
        ({**TWO_NODES, "sys/devices/system/node/node1/cpulist": "\n"}, EVERYTHING, {0: {0, 1, 2, 3}, 1: set()}),
    ],
)
def test_nodes_have_the_cpus_and_the_memory_that_this_process_may_use(files, affinity, nodes, tmp_path):
    assert find_nodes(lay_out(tmp_path, files), affinity) == nodes


def test_a_system_without_any_of_these_files_has_a_cpu_and_memory(tmp_path):
    assert find_cpus(tmp_path).num_threads >= 1
    assert cpu_quotas(tmp_path) == []
    assert find_memory(tmp_path).total > 0


@pytest.mark.parametrize(
    ("files", "total", "available", "decided_by"),
    [
        ({}, 8_192_000_000, 5_120_000_000, ""),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{CGROUP}/a/memory.max": "3000000000\n",
                f"{CGROUP}/a/memory.current": "1000000000\n",
                f"{CGROUP}/a/memory.stat": "anon 5\ninactive_file 400000000\n",
                f"{CGROUP}/a/b/memory.max": "max\n",
            },
            3_000_000_000,
            2_400_000_000,
            "/sys/fs/cgroup/a/memory.max",
        ),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                f"{CGROUP}/a/memory.max": "3000000000\n",
                f"{CGROUP}/a/memory.high": "2500000000\n",
                f"{CGROUP}/a/memory.current": "1000000000\n",
            },
            2_500_000_000,
            1_500_000_000,
            "/sys/fs/cgroup/a/memory.high",
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/docker/abc\n",
                f"{CGROUP}/memory/memory.limit_in_bytes": "2000000000\n",
                f"{CGROUP}/memory/memory.usage_in_bytes": "500000000\n",
                f"{CGROUP}/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000000\n",
            },
            2_000_000_000,
            1_600_000_000,
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ),
        (
            {"proc/self/cgroup": "5:memory:/\n", f"{CGROUP}/memory/memory.limit_in_bytes": "9223372036854771712\n"},
            8_192_000_000,
            5_120_000_000,
            "",
        ),
    ],
    ids=["no limit", "v2, above", "v2, throttled", "v1", "v1, none"],
)
def test_memory_is_what_every_limit_leaves(files, total, available, decided_by, tmp_path):
    assert find_memory(lay_out(tmp_path, files)) == (total, available, decided_by)


def test_a_limit_of_the_address_space_counts():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9));"
        "from brlite.process.machine import find_memory; print(*find_memory())"
    )

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    total, available, decided_by = printed.split(maxsplit=2)
    assert int(total) == 10**9
    assert 0 < int(available) < 10**9
    assert "RLIMIT_AS" in decided_by


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx2 fma\n", ("avx2", "fma")),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", ("asimd", "bf16")),
        ("", ()),
    ],
)
def test_instruction_sets_are_those_of_the_first_processor(cpuinfo, expected, tmp_path):
    assert find_instruction_sets(lay_out(tmp_path, {"proc/cpuinfo": cpuinfo})) == expected


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (538_060_000, "538 MB"), (3.2e13, "32 TB")],
)
def test_sizes_are_shown_in_three_digits(num_bytes, text):
    assert show_bytes(num_bytes) == text

"""What /proc says, on machines other than this one."""

from __future__ import annotations

from brlite.machine import Memory, Processor, find_memory, find_processor, parse_cpuinfo, parse_meminfo

HYPERTHREADED = "\n\n".join(
    f"processor\t: {thread}\nmodel name\t: Some CPU\nphysical id\t: 0\ncore id\t: {thread % 4}\nflags\t: fpu avx2 fma"
    for thread in range(8)
)


def test_threads_of_one_core_count_as_one_core():
    processor = parse_cpuinfo(HYPERTHREADED, frozenset(range(8)))

    assert processor == Processor(name="Some CPU", num_cores=4, num_threads=8, instruction_sets=("avx2", "fma"))


def test_only_cores_that_this_process_may_use_are_counted():
    processor = parse_cpuinfo(HYPERTHREADED, frozenset({1, 5}))

    assert (processor.num_cores, processor.num_threads) == (1, 2)


def test_an_arm_machine_without_core_numbers_counts_its_threads():
    text = "processor\t: 0\nFeatures\t: fp asimd bf16\n\nprocessor\t: 1\nFeatures\t: fp asimd bf16\n"

    processor = parse_cpuinfo(text, frozenset({0, 1}))

    assert (processor.num_cores, processor.instruction_sets) == (2, ("asimd", "bf16"))


def test_a_system_without_proc_is_described_too():
    processor = parse_cpuinfo("", frozenset({0, 1, 2}))

    assert (processor.num_cores, processor.instruction_sets) == (3, ())
    assert parse_meminfo("").total > 0


def test_memory_is_the_containers_share_where_that_is_less():
    meminfo = "MemTotal:       8000000 kB\nMemFree:  1 kB\nMemAvailable:   5000000 kB\n"

    assert parse_meminfo(meminfo, "max\n") == Memory(total=8_192_000_000, available=5_120_000_000)
    assert parse_meminfo(meminfo, "1000000\n") == Memory(total=1_000_000, available=1_000_000)


def test_this_machine_has_cores_and_memory():
    assert find_processor().num_cores >= 1
    assert 0 < find_memory().available <= find_memory().total

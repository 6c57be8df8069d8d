"""What /proc says, on machines other than this one."""

from __future__ import annotations

import pytest

from brlite.machine import Memory, find_memory, parse_instruction_sets, parse_meminfo, show_bytes


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx2 fma\n", ("avx2", "fma")),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", ("asimd", "bf16")),
        ("", ()),
    ],
)
def test_instruction_sets_are_those_of_the_first_processor(cpuinfo, expected):
    assert parse_instruction_sets(cpuinfo) == expected


def test_memory_is_the_containers_share_where_that_is_less():
    meminfo = "MemTotal:       8000000 kB\nMemFree:  1 kB\nMemAvailable:   5000000 kB\n"

    assert parse_meminfo(meminfo, "max\n") == Memory(total=8_192_000_000, available=5_120_000_000)
    assert parse_meminfo(meminfo, "1000000\n") == Memory(total=1_000_000, available=1_000_000)


def test_this_machine_has_memory_with_or_without_proc():
    assert 0 < find_memory().available <= find_memory().total
    assert parse_meminfo("").total > 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (538_060_000, "538 MB"), (3.2e13, "32 TB")],
)
def test_sizes_are_shown_in_three_digits(num_bytes, text):
    assert show_bytes(num_bytes) == text

"""The native kernels for Arm: cross-compiled, run by an emulator, compared bit for bit with those of this machine."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from brlite.backends.native import abi
from brlite.backends.native.build import SOURCES, build_library
from brlite.backends.native.library import NativeLibrary

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Kernels without instructions of their own take the longest to compile: 36 s, 13 with -O0, and 0.7 s more to run.
LESS = f'case "$*" in *isa_generic.cpp*) level=-O0 ;; *) level=-O1 ;; esac; exec {COMPILER} "$@" $level'
SYSTEM_ROOT = "/usr/aarch64-linux-gnu"  # where Debian has the C library of the processor
RESULTS = Path(__file__).with_name("toy_results.cpp")
NUM_RESULTS = 32  # precisions of weights, cache and activations
PROCESSORS = {"cortex-a72": "neon", "cortex-a76": "neon_dotprod", "max": "neon_i8mm"}  # the fastest kernels of each

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason="Debian's g++-aarch64-linux-gnu or qemu-user is not installed",
)


def build_program(compiler: str, library: Path, target: Path) -> Path:
    command = [compiler, "-std=c++17", "-O1", f"-I{SOURCES}", str(RESULTS), str(SOURCES / "toy.cpp"), str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-pthread", "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As installed on Arm, but optimised less: that takes a third of the time, and changes no bits."""
    folder = tmp_path_factory.mktemp("arm")
    build_library(folder / "brlite.so", ["sh", "-c", LESS, COMPILER])
    return build_program(COMPILER, folder / "brlite.so", folder / "results")


def results_of(command: list[str]) -> dict[str, set[str]]:
    """The lines that each instruction set prints."""
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    results: dict[str, set[str]] = {}
    for line in text.splitlines():
        _, isa, result = line.split(" ", 2)
        results.setdefault(abi.ISAS[int(isa)], set()).add(result)
    return results


@cache
def emulated(program: Path, processor: str) -> dict[str, set[str]]:
    """The results on an Arm processor: of all its kernels where it has all, else of its fastest."""
    which = [] if processor == "max" else ["best"]
    return results_of([EMULATOR, "-L", SYSTEM_ROOT, "-cpu", processor, str(program), *which])


def test_arm_computes_the_same_tokens_logits_and_cache_as_this_machine(
    arm_program: Path, native_library: NativeLibrary, tmp_path: Path
) -> None:
    here = results_of([str(build_program("g++", native_library.path, tmp_path / "results"))])

    there = emulated(arm_program, "max")

    assert list(there) == ["generic", "neon", "neon_dotprod", "neon_i8mm"]
    expected = here["generic"]
    assert len(expected) == NUM_RESULTS
    assert all(results == expected for results in (*here.values(), *there.values()))


@pytest.mark.parametrize(("processor", "isa"), PROCESSORS.items())
def test_an_arm_processor_gets_the_kernels_that_it_can_run(arm_program: Path, processor: str, isa: str) -> None:
    assert list(emulated(arm_program, processor))[-1] == isa

"""The kernels for avx_vnni, run by a processor that has the same instructions in the encoding of avx512_vnni."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from brlite.backends.native import abi
from brlite.backends.native.build import SOURCES, build_library
from brlite.backends.native.library import PASSED, NativeLibrary, available_isas, declare, run_self_tests

LEFT_OUT = ("avx2", "avx512", "avx512_vnni", "avx512_bf16")  # instruction sets: compiling them takes time
COMPILER = 'exec g++ "$@" -O1 -DBRLITE_VNNI_AS_EVEX'


def test_avx_vnni_gives_the_bits_of_the_generic_kernels(native_library: NativeLibrary, tmp_path: Path) -> None:
    if abi.ISAS.index("avx512_vnni") not in available_isas(native_library.functions) or not shutil.which("g++"):
        pytest.skip("the processor has no avx512_vnni, or g++ is not installed")
    sources = Path(shutil.copytree(SOURCES, tmp_path / "src"))
    for isa in LEFT_OUT:
        stub = f'#include "kernels.h"\nconst brlite::Kernels* brlite::{isa}_kernels() {{ return nullptr; }}\n'
        (sources / f"isa_{isa}.cpp").write_text(stub)
    build_library(tmp_path / "brlite.so", ["sh", "-c", COMPILER, "g++"], sources=sources)
    functions = ctypes.CDLL(str(tmp_path / "brlite.so"))

    declare(functions)

    assert [abi.ISAS[isa] for isa in available_isas(functions)] == ["generic", "avx_vnni"]
    assert run_self_tests(functions)["avx_vnni"] == PASSED

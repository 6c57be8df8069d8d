"""Matrices of few and of odd numbers of rows and panels, which take tiles of all shapes, by instruction set."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from brlite.backends.native import abi
from brlite.backends.native.build import FLAGS, SOURCES
from brlite.backends.native.library import NativeLibrary, available_isas

PROGRAM = Path(__file__).with_name("tiles.cpp")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DBRLITE_HAS_AVX2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-DBRLITE_HAS_AVX512"]
OPTIONS = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni", "-DBRLITE_HAS_VNNI"],
}


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_tiles_of_all_shapes_give_the_same_bits(native_library: NativeLibrary, tmp_path: Path) -> None:
    available = [abi.ISAS[isa] for isa in available_isas(native_library.functions)]
    isas = [isa for isa in OPTIONS if isa in available]
    if len(isas) < 2:
        pytest.skip("no instruction set to compare with the generic kernels")

    results = {isa: hashes_of(isa, tmp_path / isa) for isa in isas}

    assert results == dict.fromkeys(isas, results["generic"])
    assert len(results["generic"].splitlines()) == 21


def hashes_of(isa: str, program: Path) -> str:
    flags = [*FLAGS, "-O1", *OPTIONS[isa], f"-DBRLITE_ISA={isa}", f"-I{SOURCES}"]
    subprocess.run(["g++", *flags, str(PROGRAM), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout

"""Multiply-adds that are rounded once, on processors without an instruction for them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from brlite.backends.native.build import FLAGS, OWN_FLAGS, SOURCES

PROGRAM = Path(__file__).with_name("fused.cpp")


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_the_generic_kernels_round_a_multiply_add_as_fmaf_does(tmp_path: Path) -> None:
    flags = [*FLAGS, *OWN_FLAGS["isa_generic.cpp"], f"-I{SOURCES}"]
    subprocess.run(["g++", *flags, str(PROGRAM), "-o", str(tmp_path / "fused")], check=True)

    done = subprocess.run([str(tmp_path / "fused")], capture_output=True, text=True, check=False)

    assert (done.stdout, done.returncode) == ("", 0)

"""The kernels are compiled for cards, which need not be there, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.torch.triton.compile_kernels import KERNELS, SHARED_MEMORY
from tests.limits import PATIENCE_SECONDS

ROOT = Path(__file__).parents[4]
SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Cards with asynchronous matrix units, the first of those that the kernels are for, and those of least shared memory.
NEW, OLD, SMALL = 90, 80, 86
NAMES = {
    NEW: set(KERNELS) - {"attention of large heads"},
    OLD: {"gated int8"},  # the others as for SMALL, which has the same instructions and less memory
    SMALL: {"multiply many", "gated many", "attention int8", "attention of large heads"},
}
WIDENING = {"multiply few int8", "gated int8", "attention part int8", "attention int8"}

Counts = dict[str, int]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Counts]:
    """How often the code of a kernel for a kind of card has some instructions."""
    wanted = [(capability, name) for capability, names in NAMES.items() for name in sorted(names)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *(f"{capability}:{name}" for capability, name in wanted)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=4 * PATIENCE_SECONDS
    )
    assert result.returncode == 0, result.stderr[-2000:]
    counts: list[Counts] = json.loads(result.stdout)
    return dict(zip(wanted, counts, strict=True))


def having(compiled: dict[tuple[int, str], Counts], capability: int, instruction: str) -> set[str]:
    return {name for name in NAMES[capability] if compiled[capability, name][instruction] > 0}


def test_products_use_asynchronous_matrix_units_where_a_card_has_them(
    compiled: dict[tuple[int, str], Counts],
) -> None:
    products = {"multiply few", "multiply many", "multiply few int8", "gated int8", "attention int8"}
    products |= {"multiply few int4", "gated int4", "gated many"}

    assert having(compiled, NEW, "wgmma.mma_async") == products
    assert having(compiled, NEW, "mma.sync") == {"attention part int8"}  # whose rows are too few for those
    assert having(compiled, OLD, "mma.sync") == NAMES[OLD]


def test_every_tile_fits_the_shared_memory_of_the_card(compiled: dict[tuple[int, str], Counts]) -> None:
    for (capability, name), counts in compiled.items():
        assert counts["shared"] <= SHARED_MEMORY[capability], (capability, name)


@pytest.mark.parametrize("capability", NAMES)
def test_int8_is_widened_by_instructions_that_every_card_takes(
    capability: int, compiled: dict[tuple[int, str], Counts]
) -> None:
    assert having(compiled, capability, "fma.rn.bf16x2") == NAMES[capability] & WIDENING

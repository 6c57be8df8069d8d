"""The kernels run in Triton's interpreter, as numpy on the CPU: it is chosen where they are imported, and by a variable
of the environment, which other tests and the processes that they start do not have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import pytest

from tests.extras import HAS_TORCH

IS_LEFT_OUT = find_spec("triton") is None or not HAS_TORCH
INTERPRETED = patch.dict(os.environ, TRITON_INTERPRET="1")

collect_ignore_glob = ["test_*.py"] if IS_LEFT_OUT else []
if not IS_LEFT_OUT:
    with INTERPRETED:
        import_module("brlite.backends.torch.triton.steps")


@pytest.fixture(scope="package", autouse=True)
def interpreter() -> Iterator[None]:
    """What Triton imports at the first launch is interpreted, too."""
    with INTERPRETED:
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if IS_LEFT_OUT:
        terminalreporter.write_line("left out: the kernels for cards, which need triton: pip install -e '.[test,all]'")

"""The kernels run in Triton's interpreter, as numpy on the CPU: it is chosen where they are imported, and by a variable
of the environment, which other tests and the processes that they start do not have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any
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
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        """A function that a kernel calls. Triton's own patches its language again each time: a quarter of the time."""
        if function.fn.__module__ not in patched:
            patched.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **named)

    with INTERPRETED, patch.object(interpreter.InterpretedFunction, "__call__", call):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if IS_LEFT_OUT:
        terminalreporter.write_line("left out: the kernels for cards, which need triton: pip install -e '.[test,all]'")

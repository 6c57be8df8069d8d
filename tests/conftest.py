"""Fixtures that several rooms share. Fakes stand in `tests/fakes.py`."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings

from brlite.backends.native import library
from brlite.backends.native.library import NativeLibrary, load_library
from tests.extras import HAS_TORCH, is_left_out, num_tests
from tests.limits import PATIENCE_SECONDS
from tests.processes import children, wait_gone
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

# How fast an example is made and run says something of the machine only.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

gc.disable()  # until all is collected: what is imported for tests is never garbage
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # with it each process compiles all that it imports: 1 to 2 s
    sys.dont_write_bytecode = False
# torch's threads sleep at once where they wait for each other; read when torch loads, and by the commands. Beside other
# work, spinning is half of the processor time of small products. bench/kernels.md measures what the commands set.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read wherever Triton is imported, by torch as well: there is no card
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's job in the background ignores it, as its children do


left_out: list[Path] = []


def needs_torch(item: pytest.Item) -> bool:
    """By its mark, or by the name of a parameter: of what runs on both backends."""
    return item.get_closest_marker("torch") is not None or "torch" in item.name.partition("[")[2]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not is_left_out(collection_path):
        return None
    left_out.append(collection_path)
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not HAS_TORCH:
        for item in items:
            if needs_torch(item):
                item.add_marker(pytest.mark.skip(reason="needs torch: pip install -e '.[test,all]'"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """torch has some 40 loggers of which pytest takes hold one by one, six times a test: 7 ms."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.name.startswith("torch"):
            logger.propagate = True
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left_out:
        count = f"{sum(map(num_tests, left_out))} tests and more in {len(left_out)} files"
        terminalreporter.write_line(f"left out: {count}, which need torch: pip install -e '.[test,all]'")


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """Who starts a process ends it: what a file's tests leave would be found by the tests of another file."""
    before = set(children(os.getpid()))
    yield
    kept = {resource_tracker._resource_tracker._pid}  # of multiprocessing: it ends with this process
    if left := set(children(os.getpid())) - before - kept:
        gc.collect()  # an error that a test has caught keeps what its frames hold
        wait_gone(left)


@pytest.fixture(scope="session", autouse=True)
def _one_self_test() -> Iterator[None]:
    """Each load of a model tests the kernels for 0.04 s. In this process it is done once for each library."""
    test, known = library.best_isa, dict[tuple[str, str], int]()

    def best_isa(functions: ctypes.CDLL, wanted: str = "") -> int:
        key = functions._name, wanted
        if key not in known:
            known[key] = test(functions, wanted)
        return known[key]

    with patch.object(library, "best_isa", best_isa):
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model, fetched once and kept in brlite's cache folder. Mark tests that use it with `model`."""
    from brlite.checkpoint.fetch import locate_model
    from brlite.config.options import DEFAULT_MODEL

    return locate_model(DEFAULT_MODEL, None)


@pytest.fixture(scope="session")
def native_library() -> NativeLibrary:
    """The native kernels: those that were installed, or compiled once and kept in brlite's cache folder."""
    return load_library()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of one token a byte. No test changes it."""
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    write_byte_tokenizer(path)
    return path


Eventually = Callable[[Callable[[], bool]], Awaitable[None]]


@pytest.fixture
def eventually() -> Eventually:
    """`await eventually(lambda: …)` waits until it is so."""

    async def wait(is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, "it never came"
            await asyncio.sleep(0.01)

    return wait

"""Finds the native library, or has it built, and chooses the instruction set that its kernels use.

A library counts only if it was built from these very sources: the one that came with the installation first, then the
one in the cache folder, then a new one there. Knows nothing of what is computed with it.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from brlite.cache import default_cache
from brlite.errors import NativeUnavailable
from brlite.kernels import abi
from brlite.kernels.build import build_library, find_compiler, fingerprint

logger = logging.getLogger(__name__)

INSTALLED = "_native*.so"  # beside this file; extension.py puts it there
PASSED = 0


class NativeLibrary(NamedTuple):
    """A library that is as it should be, and the best instruction set that computes rightly here."""

    functions: ctypes.CDLL
    path: Path
    isa: int

    @property
    def isa_name(self) -> str:
        return abi.ISAS[self.isa]


def load_library(cache: Path | None = None) -> NativeLibrary:
    """The native library, compiled if need be, which takes half a minute once. `cache` is brlite's unless given.

    Raises `NativeUnavailable` with the reason if there is none, and no compiler that makes one.
    """
    cache = default_cache() if cache is None else cache
    path, functions = _find(cache) or _build(cache)
    library = NativeLibrary(functions, path, best_isa(functions))
    logger.info("native kernels: %s, %s", path, library.isa_name)
    return library


def find_library(cache: Path | None = None) -> NativeLibrary | None:
    """The same, but nothing is compiled: None if that would have to be done first."""
    found = _find(default_cache() if cache is None else cache)
    return None if found is None else NativeLibrary(found[1], found[0], best_isa(found[1]))


def best_isa(functions: ctypes.CDLL) -> int:
    """The last instruction set of `abi.ISAS` that is there and gives the same results as the generic kernels."""
    for isa in reversed(available_isas(functions)):
        check = functions.brlite_self_test(isa)
        if check == PASSED:
            return isa
        logger.warning("native kernels for %s are not used: they fail self-test %d", abi.ISAS[isa], check)
    raise NativeUnavailable("the native kernels fail their self-test, the generic ones too")


def available_isas(functions: ctypes.CDLL) -> list[int]:
    """The instruction sets that both this machine and this library have, the plainest first."""
    return [isa for isa in range(len(abi.ISAS)) if functions.brlite_isa_available(isa)]


def _find(cache: Path) -> tuple[Path, ctypes.CDLL] | None:
    for path in _candidates(cache):
        try:
            return path, _open(path)
        except OSError as error:
            logger.info("native library %s is not used: %s", path, error)
    return None


def _candidates(cache: Path) -> Iterator[Path]:
    yield from sorted(Path(__file__).parent.glob(INSTALLED))
    if (kept := _kept(cache)).exists():
        yield kept


def _kept(cache: Path) -> Path:
    return cache / "native" / f"brlite-{fingerprint()}.so"


def _build(cache: Path) -> tuple[Path, ctypes.CDLL]:
    compiler, path, started = find_compiler(), _kept(cache), time.monotonic()
    logger.info("compiling the native kernels with %s; this is done once", compiler[0])
    build_library(path, compiler)
    logger.info("the native kernels were compiled in %.0f s", time.monotonic() - started)
    try:
        return path, _open(path)
    except OSError as error:
        raise NativeUnavailable(f"the native library was built, but cannot be loaded: {error}") from error


def _open(path: Path) -> ctypes.CDLL:
    """Load and check. Raises OSError for a library that is broken or was built from other sources."""
    functions = ctypes.CDLL(str(path))
    if _fingerprint_of(functions) != fingerprint():
        raise OSError("it was built from other sources")
    abi.declare(functions)
    abi.check(functions)
    return functions


def _fingerprint_of(functions: ctypes.CDLL) -> str | None:
    function = getattr(functions, "brlite_fingerprint", None)
    if function is None:
        return None
    function.argtypes, function.restype = (), ctypes.c_char_p
    return str(function().decode())

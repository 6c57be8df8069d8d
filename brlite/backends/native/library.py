"""Finds the native library, or has it built, and chooses the instruction set that its kernels use.

Only a library built from exactly these sources is used. Looks at the installed one first, then at the one in the cache
folder; else builds a new one there.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

from brlite.backends.native import abi
from brlite.backends.native.build import build_library, fingerprint
from brlite.errors import ConfigError, NativeUnavailable
from brlite.files.cache import default_cache
from brlite.files.ownership import why_untrusted
from brlite.files.temporary import temporary_folder

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent  # folder of the library that extension.py builds
INSTALLED = "_native*.so"
PASSED = 0
GENERIC = abi.ISAS.index("generic")
# The results of each check of the self-test as checksums, the same on every machine. After a change of the checks or of
# the kernels' results, test_library.py shows the new ones.
CHECKSUMS = (
    *(0x84613087F9185BB2, 0x25B22E3AA9C8E9E6, 0x59760B832C04D91C, 0x9598B9DBEE8EC699),
    *(0x5E5B3789FDC07D3F, 0x50B7ADADFFA45593, 0x8AB9F18CCB73CAF6, 0xA53303DA51FB69B9),
    *(0xAB111F3F30BA2AF7, 0x4B1A039C286040E7, 0x134543D869740613, 0xC219FAAC0E6B8BF7),
    *(0x5F783FC64511E1CE, 0x3642DCDE43AA598F, 0x84717E1ABFCFB924, 0xCD325DB57E117EC0),
    *(0x5804CD744C9D24DD, 0xA27133D98E592EE6, 0xC8447F23198FA5E1),
)
ISA_VARIABLE = "BRLITE_ISA"  # the instruction set to use, for comparisons; unset: the best one


class NativeLibrary(NamedTuple):
    """A library that passed all checks, and the best instruction set that passes its self-test here."""

    functions: ctypes.CDLL
    path: Path
    isa: int

    @property
    def isa_name(self) -> str:
        return abi.ISAS[self.isa]


def load_library(
    cache: Path | None = None, *, installed: Path = HERE, build: Callable[[Path], None] = build_library
) -> NativeLibrary:
    """The native library; compiled once if missing, which takes about a minute. `cache` defaults to brlite's folder.

    Raises `NativeUnavailable` with the reason if there is no library and none can be compiled.
    """
    library = find_library(cache, installed=installed)
    if library is None:
        sources = fingerprint()
        path = _kept(cache, sources)
        try:
            with ExitStack() as opened:
                if path.parent.is_dir() and why_untrusted(path.parent):
                    path = opened.enter_context(temporary_folder(Path(gettempdir()), "brlite-native")) / path.name
                    logger.warning("the native kernels are compiled for this start only: others can write to the cache")
                build(path)
                if stranger := why_untrusted(path):
                    raise NativeUnavailable(f"the native library was compiled, but {stranger}")
                library = _checked(path, sources)
        except OSError as error:
            raise NativeUnavailable(f"the native library was compiled, but cannot be loaded: {error}") from error
    logger.info("native kernels: %s, %s", library.path, library.isa_name)
    return library


def find_library(cache: Path | None = None, *, installed: Path = HERE) -> NativeLibrary | None:
    """As `load_library`, but returns None instead of compiling."""
    sources = fingerprint()
    for found in (*sorted(installed.glob(INSTALLED)), None):
        path = found or _kept(cache, sources)  # the cache folder is looked up only if no installed library fits
        if os.path.exists(path):  # False, too, where the folder may not be read
            try:
                # Checked before loading, since loading runs its constructors. An installed library is trusted like the
                # Python code beside it.
                if found is None and (stranger := why_untrusted(path)):
                    logger.warning("native library %s is not used: %s", path, stranger)
                else:
                    return _checked(path, sources)
            except OSError as error:
                logger.info("native library %s is not used: %s", path, error)
    return None


def declare(library: ctypes.CDLL) -> None:
    """Set the ctypes types of every function. Raises OSError, as loading does, if the interface differs from `abi.py`:
    a function is missing, or the version or the size of a struct is another."""
    for name, (takes, gives) in abi.FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(f"{library._name} has no function {name}") from error
        function.argtypes, function.restype = takes, gives
    version = library.brlite_abi_version()
    if version != abi.ABI_VERSION:
        raise OSError(f"{library._name} has interface version {version}; this brlite speaks version {abi.ABI_VERSION}")
    for number, struct in enumerate(abi.STRUCTS):
        size = library.brlite_struct_size(number)
        if size != ctypes.sizeof(struct):
            raise OSError(f"{library._name} holds {struct.__name__} in {size} bytes, not {ctypes.sizeof(struct)}")


def best_isa(functions: ctypes.CDLL, wanted: str = "") -> int:
    """The last instruction set of `abi.ISAS` that is available and gives the same results as the generic kernels.

    With `wanted`, only that one; raises `ConfigError` if this machine or this library does not have it.
    """
    available = available_isas(functions)
    if wanted:
        available = [isa for isa in available if abi.ISAS[isa] == wanted]
        if not available:
            here = ", ".join(abi.ISAS[isa] for isa in available_isas(functions))
            raise ConfigError(f"{ISA_VARIABLE} is {wanted!r}; allowed on this machine are {here}")
    for isa in reversed(available):
        check = first_failed_check(functions, isa)
        if check == PASSED:
            return isa
        logger.warning("native kernels for %s are not used: they fail self-test %d", abi.ISAS[isa], check)
    raise NativeUnavailable(f"the native kernels fail their self-test, the {wanted or 'generic'} ones too")


def available_isas(functions: ctypes.CDLL) -> list[int]:
    """The instruction sets that both this machine and this library have, the plainest first."""
    return [isa for isa in range(len(abi.ISAS)) if functions.brlite_isa_available(isa)]


def run_self_tests(functions: ctypes.CDLL) -> dict[str, int]:
    """Each available instruction set → 0, or the number of the first check that it fails."""
    return {abi.ISAS[isa]: first_failed_check(functions, isa) for isa in available_isas(functions)}


def first_failed_check(functions: ctypes.CDLL, isa: int) -> int:
    """0, or the number of the first check in which an instruction set computes other bits than the generic kernels.

    The generic kernels are slow: they compute a check only if its result is not the known one.
    """
    for number, known in enumerate(CHECKSUMS):
        found = functions.brlite_self_test(isa, number)
        if found != known and (not found or found != functions.brlite_self_test(GENERIC, number)):
            return number + 1
    return PASSED


def _kept(cache: Path | None, sources: str) -> Path:
    return (default_cache() if cache is None else cache) / "native" / f"brlite-{sources}.so"


def _checked(path: Path, sources: str) -> NativeLibrary:
    """Load and check a library. Raises OSError if it is broken, or has another fingerprint than `sources`."""
    functions = ctypes.CDLL(str(path))
    own = getattr(functions, "brlite_fingerprint", None)
    if own is not None:
        own.argtypes, own.restype = (), ctypes.c_char_p
    if own is None or own().decode() != sources:
        raise OSError("it was built from other sources")
    declare(functions)
    return NativeLibrary(functions, path, best_isa(functions, os.environ.get(ISA_VARIABLE, "")))

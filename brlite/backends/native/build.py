"""Compiles the native library: one compiler process per source file, a few at a time, then one that links.

setuptools calls this when brlite is installed (extension.py); if that failed, the first start does. Imports only files
that need nothing but Python, since it runs before other packages are installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from brlite.errors import NativeUnavailable
from brlite.files.ownership import forbid_others_to_write
from brlite.files.quoting import one_line
from brlite.files.temporary import temporary_folder
from brlite.process.children import ChildGroup, absolute_folders, child_environment
from brlite.process.machine import physical_cores

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
# For equal bits everywhere, the compiler may not fuse multiply-adds or tune for this machine (-march=native).
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fwrapv", "-fno-math-errno", "-Wno-psabi"),
)
# The flags that one file has besides. The kernels for processors with none of the other instruction sets take the
# longest to compile, so they start first; with -O1 that takes 0.4 times as long as with -O3, and their steps took no
# longer.
OWN_FLAGS = {"isa_generic.cpp": ("-O1",)}
LINK_FLAGS = ("-shared", "-pthread")
COMPILERS = ("g++", "c++", "clang++")
ZIG_PACKAGE = "ziglang"  # clang as a Python package: what a build uses where the system has no compiler
# zig compiles for the building processor by default, and adds undefined-behaviour checks; both are turned off.
ZIG_FLAGS = ("c++", "-mcpu=baseline", "-fno-sanitize=undefined", "-g0")
HOW_TO_GET_ONE = f"install one (Debian: apt install g++), or: pip install {ZIG_PACKAGE}"
MAX_PROCESSES = 4
BUILD_SECONDS = 600.0
POLL_SECONDS = 0.02
BUILD_PREFIX = ".build"  # of the folders in which builds run


def fingerprint(sources: Path = SOURCES) -> str:
    """A hash of what a library is built from: sources, flags, operating system and processor architecture.

    The architecture is this machine's, or the one that a cross-compiling build of a wheel sets for setuptools.
    """
    machine = os.environ.get("_PYTHON_HOST_PLATFORM", "").rpartition("-")[2] or platform.machine()  # linux-aarch64
    flags = (*FLAGS, *chain(*OWN_FLAGS.values()), *LINK_FLAGS)
    digest = hashlib.sha256(" ".join((*flags, platform.system(), machine)).encode())
    for path in sorted((*sources.glob("*.cpp"), *sources.glob("*.h"))):
        content = path.read_bytes()
        digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def is_current(library: Path) -> bool:
    """Whether a library was built from the sources beside this file."""
    return library.is_file() and fingerprint().encode() in library.read_bytes()


def find_compiler(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command of the C++ compiler: CXX, else the first of `COMPILERS`, else the package ziglang's."""
    wanted = shlex.split(environment.get("CXX", ""))
    for name in wanted[:1] or COMPILERS:
        if (path := shutil.which(name, path=absolute_folders(environment.get("PATH", os.defpath)))) is not None:
            return [path, *wanted[1:]]
    if wanted:
        raise NativeUnavailable(f"CXX is {environment['CXX']!r}, which was not found")
    package = importlib.util.find_spec(ZIG_PACKAGE)
    if package is not None and package.origin is not None:
        return [str(Path(package.origin).with_name("zig")), *ZIG_FLAGS]
    raise NativeUnavailable(f"no C++ compiler was found (none of {', '.join(COMPILERS)}); {HOW_TO_GET_ONE}")


def build_library(
    target: Path, compiler: Sequence[str] | None = None, *, sources: Path = SOURCES, seconds: float = BUILD_SECONDS
) -> None:
    """Compile to `target`, which is replaced atomically; several processes may build it at once.

    Writes nothing outside the target's folder. Raises `NativeUnavailable` with the reason.
    """
    compiler, started = find_compiler() if compiler is None else compiler, time.monotonic()
    logger.info("compiling the native kernels with %s, once", compiler[0])
    try:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with temporary_folder(target.parent, BUILD_PREFIX) as staging:
            units = sorted(sources.glob("*.cpp"), key=lambda path: (path.name not in OWN_FLAGS, path.name))
            objects = [str(staging / f"{unit.stem}.o") for unit in units]
            library = staging / "library.so"
            command = [*compiler, *FLAGS, f'-DBRLITE_FINGERPRINT="{fingerprint(sources)}"']
            compiling = (
                [*command, *OWN_FLAGS.get(unit.name, ()), "-c", str(unit), "-o", to]
                for unit, to in zip(units, objects, strict=True)
            )
            _run_all(compiling, staging, started + seconds)
            _run_all([[*compiler, *LINK_FLAGS, "-o", str(library), *objects]], staging, started + seconds)
            forbid_others_to_write(library)  # else it is not trusted
            library.replace(target)
    except OSError as error:
        raise NativeUnavailable(f"the native library cannot be built: {error}") from error
    logger.info("the native kernels were compiled in %.0f s", time.monotonic() - started)


class _Process(NamedTuple):
    process: subprocess.Popen[bytes]
    said: Path

    def is_done(self) -> bool:
        """Raises `NativeUnavailable` if it failed."""
        status = self.process.poll()
        if status:  # the first line that is an error, or else the first
            lines = self.said.read_text(encoding="utf-8", errors="replace").split("\n")
            line = next((line for line in lines if "error" in line), lines[0])
            said = one_line(line) or "it said nothing"
            raise NativeUnavailable(f"the C++ compiler failed with status {status}: {said}")
        return status is not None


def _run_all(commands: Iterable[list[str]], staging: Path, deadline: float) -> None:
    """Run the commands, up to MAX_PROCESSES at once. If one fails, the others are ended."""
    waiting = list(commands)[::-1]
    running: list[_Process] = []
    caches = {name: str(staging) for name in ("TMPDIR", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    environment = child_environment(LC_ALL="C", **caches)
    with ChildGroup() as group:
        while waiting or running:
            while waiting and len(running) < min(physical_cores(), MAX_PROCESSES):
                command = waiting.pop()
                said = Path(f"{command[command.index('-o') + 1]}.txt")
                with said.open("wb") as stream:
                    process = group.start(command, env=environment, stdout=stream, stderr=stream)
                running.append(_Process(process, said))
            running = [process for process in running if not process.is_done()]
            if time.monotonic() > deadline:
                raise NativeUnavailable("the C++ compiler took too long")
            time.sleep(POLL_SECONDS)

"""Compiling the native library: with stubs in place of compilers, so nothing here depends on one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from brlite.backends.native.build import build_library, find_compiler, fingerprint
from brlite.backends.native.extension import _missing_compiler
from brlite.errors import NativeUnavailable
from brlite.files.ownership import why_untrusted

WORKS = """
inputs = [Path(name) for name in sys.argv if name.endswith((".cpp", ".o")) and name != str(target)]
target.write_text("".join(path.read_text() for path in inputs))
"""
FAILS = """
print("In file included from a.cpp:1:", file=sys.stderr)
print("a.h:7: error: 'nonsense' was not declared\\n1 error generated.", file=sys.stderr)
sys.exit(1)
"""
FAILS_SILENTLY = "sys.exit(3)"
HANGS = "import time; time.sleep(1000)"
FAILS_FOR_ONE_AND_HANGS_FOR_OTHERS = f"""
if target.name == "isa_generic.o": {FAILS_SILENTLY}
{HANGS}
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    for name in ("a.cpp", "b.cpp", "isa_generic.cpp", "a.h"):
        (folder / name).write_text(f"<{name}>")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "native" / "library.so"


@pytest.fixture
def stub(tmp_path: Path):
    """A compiler that does as a few lines of Python say; `target` is what it should write."""

    def write(lines: str) -> list[str]:
        script = tmp_path / "compiler.py"
        head = "import sys\nfrom pathlib import Path\ntarget = Path(sys.argv[sys.argv.index('-o') + 1])\n"
        script.write_text(head + lines)
        return [sys.executable, "-IS", str(script)]

    return write


def test_every_source_is_compiled_and_all_are_linked(stub, sources, target):
    build_library(target, stub(WORKS), sources=sources)

    assert target.read_text() == "<isa_generic.cpp><a.cpp><b.cpp>"
    assert list(target.parent.iterdir()) == [target]


def test_a_library_is_trusted_with_any_umask(stub, sources, target):
    umask = os.umask(0)
    try:
        build_library(target, stub(WORKS), sources=sources)
    finally:
        os.umask(umask)

    assert why_untrusted(target) is None


def test_a_compiler_that_fails_is_quoted(stub, sources, target):
    with pytest.raises(NativeUnavailable, match=r"status 1: a\.h:7: error: 'nonsense' was not declared$"):
        build_library(target, stub(FAILS), sources=sources)

    assert list(target.parent.iterdir()) == []


def test_a_compiler_that_says_nothing_is_said_to(stub, sources, target):
    with pytest.raises(NativeUnavailable, match="status 3: it said nothing"):
        build_library(target, stub(FAILS_SILENTLY), sources=sources)


def test_a_compiler_that_hangs_is_ended(stub, sources, target):
    with pytest.raises(NativeUnavailable, match="took too long"):
        build_library(target, stub(HANGS), sources=sources, seconds=0.05)

    assert list(target.parent.iterdir()) == []


def test_one_failure_ends_the_compilers_beside_it(stub, sources, target):
    with pytest.raises(NativeUnavailable, match="it said nothing"):
        build_library(target, stub(FAILS_FOR_ONE_AND_HANGS_FOR_OTHERS), sources=sources)

    assert list(target.parent.iterdir()) == []


def test_a_failed_build_leaves_the_library_that_was_there(stub, sources, target):
    build_library(target, stub(WORKS), sources=sources)
    before = target.read_text()

    with pytest.raises(NativeUnavailable):
        build_library(target, stub(FAILS), sources=sources)

    assert target.read_text() == before


def test_two_may_build_the_same_library_at_once(stub, sources, target):
    compiler = stub(WORKS)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: build_library(target, compiler, sources=sources), range(2)))

    assert target.read_text() == "<isa_generic.cpp><a.cpp><b.cpp>"
    assert list(target.parent.iterdir()) == [target]


def test_a_compiler_that_cannot_be_started_is_reported(sources, target):
    with pytest.raises(NativeUnavailable, match="No such file or directory: '/proc/absent/compiler'"):
        build_library(target, ["/proc/absent/compiler"], sources=sources)


def test_a_folder_that_cannot_be_made_is_reported(stub, sources, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(NativeUnavailable, match=r"cannot be built: .*/file"):
        build_library(tmp_path / "file" / "library.so", stub(WORKS), sources=sources)


@pytest.mark.parametrize("name", ["a.cpp", "a.h", "new.h"])
def test_a_changed_source_changes_the_fingerprint(sources, name):
    before = fingerprint(sources)

    (sources / name).write_text("changed")

    assert fingerprint(sources) != before


def test_a_wheel_for_another_processor_has_the_fingerprint_that_is_expected_there(sources, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    there = fingerprint(sources)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    here = fingerprint(sources)

    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")

    assert fingerprint(sources) == there != here


def test_what_is_no_source_leaves_the_fingerprint_alone(sources):
    before = fingerprint(sources)

    (sources / "notes.txt").touch()

    assert fingerprint(sources) == before


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder to be searched for compilers."""
    for name in ("g++", "c++", "mine"):
        (tmp_path / name).touch(mode=0o755)
    return tmp_path


def test_the_compiler_that_is_there_is_found(programs):
    (programs / "g++").unlink()

    assert find_compiler({"PATH": str(programs)}) == [str(programs / "c++")]


def test_cxx_comes_first_and_may_have_arguments(programs):
    assert find_compiler({"PATH": str(programs), "CXX": "mine -m64"}) == [str(programs / "mine"), "-m64"]


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ziglang is not installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_without_a_compiler_those_looked_for_and_the_remedies_are_named(tmp_path, without_packages):
    with pytest.raises(
        NativeUnavailable, match=r"none of g\+\+, c\+\+, clang\+\+.*apt install g\+\+.*pip install ziglang"
    ):
        find_compiler({"PATH": str(tmp_path)})


def test_without_a_compiler_the_package_ziglang_is_used_for_any_processor(tmp_path, monkeypatch):
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    program, *arguments = find_compiler({"PATH": ""})

    assert program == str(tmp_path / "ziglang" / "zig")
    assert arguments[:2] == ["c++", "-mcpu=baseline"]


def test_a_build_asks_for_a_compiler_only_where_there_is_none(programs, monkeypatch, without_packages):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(programs))
    assert _missing_compiler() == []

    monkeypatch.setenv("PATH", "")
    assert _missing_compiler() == ["ziglang"]


def test_a_cxx_that_is_not_there_is_named(programs):
    with pytest.raises(NativeUnavailable, match="CXX is 'other', which was not found"):
        find_compiler({"PATH": str(programs), "CXX": "other"})


INSTALL = """
import sys
from pathlib import Path
from setuptools import Distribution, Extension
from brlite.backends.native.extension import BuildNative

native = Extension("brlite.backends.native._native", [], optional=True)
command = BuildNative(Distribution({"name": "brlite", "ext_modules": [native]}))
command.build_lib, command.built_before = sys.argv[1], Path(sys.argv[2])
command.ensure_finalized()
command.run()
"""


def install(folder: Path, compiler: list[str], built_before: Path = Path("/proc/absent")) -> list[Path]:
    """What setuptools leaves in `folder`."""
    environment = {**os.environ, "CXX": " ".join(compiler)}
    command = [sys.executable, "-c", INSTALL, str(folder), str(built_before)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def test_installing_builds_the_library(stub, tmp_path):
    assert install(tmp_path / "build", stub(WORKS)) == [Path("brlite/backends/native/_native.so")]


def test_a_library_of_the_same_sources_is_not_built_again(stub, tmp_path):
    before = tmp_path / "_native.so"
    before.write_text(f"of {fingerprint()}")

    installed = install(tmp_path / "build", stub(FAILS), before)

    assert [(tmp_path / "build" / path).read_text() for path in installed] == [before.read_text()]


def test_a_library_of_other_sources_is_built_again(stub, tmp_path):
    before = tmp_path / "_native.so"
    before.write_text("of another fingerprint")

    assert install(tmp_path / "build", stub(FAILS), before) == []


def test_installing_without_a_compiler_that_works_succeeds(stub, tmp_path):
    assert install(tmp_path / "build", stub(FAILS)) == []

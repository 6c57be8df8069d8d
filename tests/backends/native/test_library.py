"""Finding the native library, and choosing an instruction set. Real ones come from the `native_library` fixture."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path

import pytest

from brlite.backends.native import abi
from brlite.backends.native.build import fingerprint
from brlite.backends.native.library import (
    CHECKSUMS,
    PASSED,
    available_isas,
    best_isa,
    find_library,
    first_failed_check,
    load_library,
    run_self_tests,
)
from brlite.errors import ConfigError, NativeUnavailable


class FakeFunctions:
    """A library whose instruction sets are there and pass their self-test as told."""

    def __init__(self, *, there: tuple[str, ...], failing: tuple[str, ...] = ()) -> None:
        self._there, self._failing, self._wrong = there, failing, itertools.count(1)

    def brlite_isa_available(self, isa: int) -> int:
        return abi.ISAS[isa] in self._there

    def brlite_self_test(self, isa: int, check: int) -> int:
        """A failing one computes something else each time, from check 7 on."""
        return next(self._wrong) if abi.ISAS[isa] in self._failing and check >= 6 else CHECKSUMS[check]


def never(path: Path) -> None:
    raise AssertionError("nothing needs to be built")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    folder = tmp_path / "installed"
    folder.mkdir()
    return folder


@pytest.fixture
def build(native_library):
    """Builds a library at once."""

    def copy(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(native_library.path, path)

    return copy


def test_every_instruction_set_gives_the_bits_of_the_generic_one(native_library):
    results = run_self_tests(native_library.functions)

    assert results == dict.fromkeys(results, 0)
    assert results.keys() >= {"generic", native_library.isa_name}


def test_an_instruction_set_is_there_where_linux_says_so(native_library):
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx_vnni": {"avx2", "avx_vnni"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_vnni": {"avx512bw", "avx512_vnni"},
        "avx512_bf16": {"avx512_vnni", "avx512_bf16"},
        "neon": {"asimd"},
        "neon_dotprod": {"asimddp"},
        "neon_i8mm": {"asimddp", "i8mm"},
    }
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    expected = [name for name in abi.ISAS if needed.get(name, set()) <= flags]

    assert [abi.ISAS[isa] for isa in available_isas(native_library.functions)] == expected


def test_the_generic_kernels_give_the_known_results(native_library):
    generic = abi.ISAS.index("generic")
    found = [native_library.functions.brlite_self_test(generic, check) for check in range(len(CHECKSUMS) + 1)]

    assert [hex(result) for result in found] == [hex(result) for result in (*CHECKSUMS, 0)]


def test_results_that_are_new_pass_where_the_generic_kernels_have_them_too(monkeypatch):
    functions = FakeFunctions(there=("generic", "avx2"))
    monkeypatch.setattr(functions, "brlite_self_test", lambda isa, check: CHECKSUMS[check] + 1)

    assert first_failed_check(functions, abi.ISAS.index("avx2")) == PASSED


def test_an_instruction_set_that_is_not_there_fails_its_self_test(native_library):
    assert first_failed_check(native_library.functions, len(abi.ISAS)) == 1


def test_the_last_instruction_set_of_the_machine_is_chosen(native_library):
    assert best_isa(native_library.functions) == available_isas(native_library.functions)[-1]


def test_the_instruction_set_can_be_forced(native_library, monkeypatch):
    monkeypatch.setenv("BRLITE_ISA", "generic")

    assert load_library().isa_name == "generic"


@pytest.mark.parametrize("wanted", ["avx512_bf16", "sse2", "AVX2"])
def test_forcing_one_that_is_not_there_is_refused_with_those_that_are(wanted):
    functions = FakeFunctions(there=("generic", "avx2"))

    with pytest.raises(ConfigError, match=f"BRLITE_ISA is '{wanted}'; allowed on this machine are generic, avx2"):
        best_isa(functions, wanted)


def test_a_forced_one_that_computes_otherwise_is_not_used():
    functions = FakeFunctions(there=("generic", "avx2"), failing=("avx2",))

    with pytest.raises(NativeUnavailable, match="fail their self-test, the avx2 ones too"):
        best_isa(functions, "avx2")


def test_an_instruction_set_that_computes_otherwise_is_left_out_aloud(caplog):
    functions = FakeFunctions(there=("generic", "avx2", "avx512"), failing=("avx512",))

    with caplog.at_level(logging.WARNING):
        isa = best_isa(functions)

    assert abi.ISAS[isa] == "avx2"
    assert caplog.messages == ["native kernels for avx512 are not used: they fail self-test 7"]


def test_a_library_that_fails_altogether_is_not_used():
    functions = FakeFunctions(there=("generic", "avx2"), failing=("generic", "avx2"))

    with pytest.raises(NativeUnavailable, match="the generic ones too"):
        best_isa(functions)


def test_an_installed_library_is_used_before_any_is_built(build, installed, cache):
    build(installed / "_native.so")

    library = load_library(cache, installed=installed, build=never)

    assert library.path == installed / "_native.so"
    assert not cache.exists()


def test_a_library_is_built_into_the_cache_once(build, installed, cache):
    built = load_library(cache, installed=installed, build=build)

    again = load_library(cache, installed=installed, build=never)

    assert built.path == again.path == cache / "native" / f"brlite-{fingerprint()}.so"


def test_a_library_from_other_sources_is_not_used(build, installed, cache):
    stale = installed / "_native.so"
    build(stale)
    stale.write_bytes(stale.read_bytes().replace(fingerprint().encode(), b"0" * len(fingerprint())))

    library = load_library(cache, installed=installed, build=build)

    assert library.path.parent == cache / "native"


def test_a_library_that_is_not_brlites_is_not_used(installed, cache):
    shutil.copyfile(__file__, installed / "_native.so")

    assert find_library(cache, installed=installed) is None


def test_a_build_that_cannot_be_loaded_is_reported_and_made_again(build, installed, cache):
    def build_nonsense(path: Path) -> None:
        path.parent.mkdir(parents=True)
        path.write_text("nonsense")

    with pytest.raises(NativeUnavailable, match="compiled, but cannot be loaded"):
        load_library(cache, installed=installed, build=build_nonsense)

    assert load_library(cache, installed=installed, build=build).isa_name


def test_looking_builds_nothing(installed, cache):
    assert find_library(cache, installed=installed) is None
    assert not cache.exists()

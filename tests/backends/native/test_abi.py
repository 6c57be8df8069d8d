"""The ctypes side of the interface against the header, and against a library that is not as expected."""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace
from typing import Any

import pytest

from brlite.backends.native import abi
from brlite.backends.native.build import SOURCES
from brlite.backends.native.library import NativeLibrary, declare
from brlite.models.config import QUANTIZATION_GROUP
from brlite.sampling_params import SamplingParams

HEADER = (SOURCES / "brlite.h").read_text(encoding="utf-8")
CONSTANTS = {
    "ABI_VERSION": abi.ABI_VERSION,
    "LANES": abi.LANES,
    "GROUP": QUANTIZATION_GROUP,
    "MAX_HEAD_DIM": abi.MAX_HEAD_DIM,
    "HEAD_ROWS": abi.HEAD_ROWS,
}


def fake_library(*, version: int = abi.ABI_VERSION, larger: type[ctypes.Structure] | None = None) -> Any:
    """A library that has every function, this version, and one struct larger than it should be."""
    sizes = [ctypes.sizeof(struct) + 8 * (struct is larger) for struct in abi.STRUCTS]
    functions: dict[str, Any] = {name: lambda: 0 for name in abi.FUNCTIONS}  # a function each: their types are set
    functions |= {"brlite_abi_version": lambda: version, "brlite_struct_size": lambda number: sizes[number]}
    return SimpleNamespace(_name="fake.so", **functions)


def declared_fields(struct: type[ctypes.Structure]) -> list[str]:
    """The names of a struct's fields in the header, in order."""
    name = struct.__name__.removeprefix("Native").lower()
    [body] = re.findall(rf"typedef struct brlite_{name} {{(.*?)}} brlite_{name};", HEADER, re.DOTALL)
    return re.findall(r"(\w+);", re.sub(r"//.*", "", body))


@pytest.mark.parametrize("struct", [struct for struct in abi.STRUCTS if struct is not abi.Draw])
def test_a_struct_has_the_fields_of_the_header(struct: type[ctypes.Structure]) -> None:
    assert [field[0] for field in struct._fields_] == declared_fields(struct)


def test_a_draw_has_every_field_of_its_header() -> None:
    lines = (SOURCES / "draw_fields.h").read_text(encoding="utf-8").splitlines()

    assert len(abi.Draw._fields_) == sum(line.startswith(("FIELD", "PARAMETER")) for line in lines)
    assert set(abi.DRAW_PARAMETERS) <= set(SamplingParams.__struct_fields__)


def test_every_function_of_the_header_is_declared() -> None:
    assert list(abi.FUNCTIONS) == re.findall(r"^\w[^(/]*?(brlite_\w+)\(", HEADER, re.MULTILINE)


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_that_of_the_header(name: str) -> None:
    assert re.findall(rf"#define BRLITE_{name} (\d+)", HEADER) == [str(CONSTANTS[name])]


def test_the_instruction_sets_of_cpp_are_in_the_order_of_python() -> None:
    table, kernels = ((SOURCES / name).read_text(encoding="utf-8") for name in ("isas.cpp", "kernels.h"))
    [rows] = re.findall(r"constexpr Isa ISAS\[\w+\] = (.*?);", table, re.DOTALL)

    assert re.findall(r"(\w+)_kernels", rows) == list(abi.ISAS)
    assert re.findall(r"Kernels\* (\w+)_kernels\(\);", kernels) == list(abi.ISAS)
    assert {path.stem for path in SOURCES.glob("isa_*.cpp")} == {f"isa_{name}" for name in abi.ISAS}


@pytest.mark.parametrize(
    ("enum", "names"),
    [
        ("isa", [name.upper() for name in abi.ISAS] + ["NUM_ISAS"]),
        (
            "format",
            [
                "INT8",
                "BF16",
                "INT8_F16",
                "INT4",
                "INT4_MIN",
                "INT4_ZERO",
                "Q4_K",
                "Q6_K",
                "IQ4_NL",
                "IQ4_XS",
                "MXFP4",
                "NUM_FORMATS",
            ],
        ),
        ("kind", ["EMBED", "NORM", "LINEAR", "ADD", "ROPE", "ATTEND", "QUANTIZE", "SILU", "GATE"]),
    ],
)
def test_choices_are_numbered_as_in_the_header(enum: str, names: list[str]) -> None:
    [body] = re.findall(rf"enum brlite_{enum} {{(.*?)}};", HEADER, re.DOTALL)

    assert re.findall(r"BRLITE_(\w+)", body) == names
    numbers = [getattr(abi, name) for name in names if hasattr(abi, name)]
    assert numbers == list(range(len(numbers)))


def test_the_library_is_as_declared(native_library: NativeLibrary) -> None:
    declare(native_library.functions)


def test_another_version_is_refused() -> None:
    with pytest.raises(
        OSError, match=rf"fake\.so has interface version 99; this brlite speaks version {abi.ABI_VERSION}"
    ):
        declare(fake_library(version=99))


def test_a_struct_of_another_size_is_refused() -> None:
    with pytest.raises(OSError, match=r"holds NativeSpan in 32 bytes, not 24"):
        declare(fake_library(larger=abi.NativeSpan))


def test_a_library_that_lacks_a_function_is_refused() -> None:
    with pytest.raises(OSError, match="has no function brlite_abi_version"):
        declare(ctypes.CDLL(None))

"""The GGUF header reader, against the gguf package's own."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest

from brlite.errors import ModelError
from brlite.tokenizer.gguf_metadata import read_gguf_metadata

ADDERS = {
    "uint8": 200,
    "int8": -5,
    "uint16": 60_000,
    "int16": -3000,
    "uint32": 2**32 - 1,
    "int32": -(2**31),
    "uint64": 2**64 - 1,
    "int64": -(2**63),
    "float32": 0.25,
    "float64": 1e300,
    "bool": True,
    "string": "<|im_start|> 你好 \U0001f642",
    "array": ["a", "", "Ġthe", "你"],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for kind, value in ADDERS.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_array("test.scores", [0.5, -1.25])
    writer.add_array("test.flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def header(value_type: int, value: bytes) -> bytes:
    """A GGUF header with one key of a given type."""
    return struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", value_type) + value


def test_every_kind_of_value_is_read_as_the_gguf_package_reads_it(file: Path) -> None:
    fields = gguf.GGUFReader(file).fields

    metadata = read_gguf_metadata(file)

    assert metadata == {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert metadata["test.array"] == ADDERS["array"]


def test_a_file_cut_short_anywhere_is_one_clear_line(file: Path) -> None:
    whole = file.read_bytes()

    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError) as caught:
            read_gguf_metadata(file)
        assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + bytes(32), "not a little-endian GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "not a little-endian GGUF file of version 2 or 3"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "not a little-endian GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), "cut short or damaged"),
        (header(13, bytes(8)), "a value of unknown type 13"),
        (header(9, struct.pack("<IQ", 9, 1)), "a list of lists"),
        (header(9, struct.pack("<IQ", 4, 2**62)), "cut short or damaged"),
        (header(9, struct.pack("<IQ", 8, 2**62)), "cut short or damaged"),
        (header(8, struct.pack("<Q", 2**64 - 1)), "cut short or damaged"),
        (header(8, struct.pack("<Q2s", 2, b"\xff\xfe")), "cut short or damaged"),
    ],
)
def test_damage_is_refused_at_once(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(data)

    with pytest.raises(ModelError, match=message):
        read_gguf_metadata(file)

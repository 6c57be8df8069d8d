"""The header of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md): metadata and the table of tensors. Reads no data.

The `gguf` package's own reader makes numpy arrays of every string and number: 3 s for a vocabulary of 49k tokens,
where this one takes 0.1 s. It also trusts the file's counts; this one never reads or allocates beyond the file's size.
"""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from pathlib import Path
from typing import Any, NamedTuple

from brlite.checkpoint.model_file import check_model_file
from brlite.errors import ModelError
from brlite.files.quoting import excerpt

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_HEADER_BYTES = 64 * 2**20  # 49,152 tokens take 1.8 MB; in memory, short texts up to 7 times as much
MAX_STRINGS = 2**21  # of a list: of tokens or of merges
MAX_ROWS = 2**16  # of the metadata, which has about 30, and of the table of tensors: about 10 a layer

NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# A sampling parameter → the key under which a file recommends a value.
GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
STRING_TYPE = 8
VOCABULARY = "tokenizer."  # begins the keys of a tokenizer
ARRAY_TYPE = 9


class GgufTensor(NamedTuple):
    """One row of the table of tensors. `shape` is in torch's order; `offset` counts from the end of the header."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int


class GgufHeader(NamedTuple):
    """Everything before the tensor data, which starts at byte `data_start` of a file of `num_file_bytes`.

    Arrays of numbers in the metadata are `array.array`s. A tokenizer's arrays of texts are empty unless they were
    wanted.
    """

    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    data_start: int
    num_file_bytes: int


def read_gguf_header(file: Path, *, with_texts: bool = False) -> GgufHeader:
    """Read the header of a GGUF file. Raises `ModelError` if the file is truncated or of another kind."""
    check_model_file(file, "GGUF")
    try:
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise ModelError(f"{file}: not a GGUF file: it does not begin with {MAGIC.decode()}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, len(MAGIC), with_texts).header()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (_Broken, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: broken GGUF header: {error}") from error


class _Broken(ValueError):
    """What is wrong with the header; `read_gguf_header` adds the file's name."""


class _Cursor:
    """A position in the header. Every read is checked against the file's size first."""

    def __init__(self, data: mmap.mmap, position: int, with_texts: bool) -> None:
        self.data = data
        self.position = position
        self.with_texts = with_texts
        self.end = min(len(data), MAX_HEADER_BYTES)

    def take(self, num_bytes: int) -> int:
        """Step over `num_bytes` and return where they begin."""
        begin = self.position
        if num_bytes > self.end - begin:
            raise self.cut(num_bytes, begin)
        self.position = begin + num_bytes
        return begin

    def cut(self, num_bytes: int, begin: int) -> _Broken:
        """The error for `num_bytes` that go beyond the end of the file, or of what a header may have."""
        due = f"{num_bytes} bytes are due at byte {begin}"
        if begin + num_bytes > len(self.data):
            return _Broken(f"truncated: {due}, but the file ends at {len(self.data)}")
        return _Broken(f"{due}, but a header may have {MAX_HEADER_BYTES}")

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        begin = self.take(struct.calcsize("<" + code) * count)
        return struct.unpack_from(f"<{count}{code}", self.data, begin)

    def array(self, code: str, count: int) -> array[Any]:
        """As `numbers`, but an `array`, as large as in the file. A list of bytes would take 17 times as much."""
        begin = self.take(struct.calcsize("<" + code) * count)
        values: array[Any] = array("B" if code == "?" else code)
        values.frombytes(self.data[begin : self.position])
        if sys.byteorder == "big":
            values.byteswap()
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        num_bytes = self.number("Q")
        begin = self.take(num_bytes)
        return self.data[begin : begin + num_bytes].decode()

    def strings(self, count: int, *, is_wanted: bool) -> list[str]:
        """`count` strings, or none of them. 8 times as fast as calling `string`: a vocabulary has very many."""
        if count > MAX_STRINGS:
            raise _Broken(f"a list of {count} strings at byte {self.position} (allowed: {MAX_STRINGS})")
        data, position, size = self.data, self.position, self.end
        read_length = struct.Struct("<Q").unpack_from
        texts: list[str] = []
        add = texts.append
        for _ in range(count):
            begin = position + 8
            if begin > size:
                raise self.cut(8, position)
            if (end := begin + read_length(data, position)[0]) > size:
                raise self.cut(end - begin, begin)
            if is_wanted:
                add(data[begin:end].decode())
            position = end
        self.position = position
        return texts

    def value(self, key: str) -> Any:
        """The value of a key of the metadata. Its type comes first."""
        type_id = self.number("I")
        if type_id in NUMBER_FORMATS:
            return self.number(NUMBER_FORMATS[type_id])
        if type_id == STRING_TYPE:
            return self.string()
        if type_id != ARRAY_TYPE:
            raise _Broken(f"unknown value type {type_id} at byte {self.position}")
        item_type, count = self.number("I"), self.number("Q")
        if item_type == STRING_TYPE:
            return self.strings(count, is_wanted=self.with_texts or not key.startswith(VOCABULARY))
        if item_type not in NUMBER_FORMATS:
            raise _Broken(f"array of unknown type {item_type} at byte {self.position}")
        return self.array(NUMBER_FORMATS[item_type], count)

    def tensor(self) -> GgufTensor:
        """A row of the table of tensors."""
        name = self.string()
        num_dimensions = self.number("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise _Broken(f"tensor {excerpt(name)} has {num_dimensions} dimensions; allowed are 1 to {MAX_DIMENSIONS}")
        shape = self.numbers("Q", num_dimensions)[::-1]  # GGUF lists the innermost dimension first
        return GgufTensor(name, self.number("I"), shape, self.number("Q"))

    def header(self) -> GgufHeader:
        """Everything after the magic number."""
        version = self.number("I")
        if version not in VERSIONS:
            raise _Broken(f"version {version} (allowed are {VERSIONS[0]} and {VERSIONS[1]}, little-endian)")
        num_tensors, num_metadata = self.numbers("Q", 2)
        for num_rows, of in ((num_metadata, "keys"), (num_tensors, "tensors")):
            if num_rows > MAX_ROWS:
                raise _Broken(f"it has {num_rows} {of} (allowed: {MAX_ROWS})")
        metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self.string()
            if key in metadata:
                raise _Broken(f"the key {excerpt(key)} is listed twice")
            metadata[key] = self.value(key)
        tensors = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Broken(f"general.alignment must be a power of two, got {excerpt(alignment)}")
        data_start = -(-self.position // alignment) * alignment
        return GgufHeader(metadata, tensors, data_start, len(self.data))

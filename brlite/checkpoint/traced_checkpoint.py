"""Reads a traced `.pt`, the TorchScript archive that the manual's conversion writes, as a checkpoint.

The archive is a zip file: `data.pkl` describes the traced module and its tensors, `code/` holds the graph as text, and
`data/` the numbers, uncompressed. All of it is read as data; nothing is executed. Tensors have Hugging Face's names:
those of the modules that were traced. The config comes from the model's folder. Buffers (rotary tables,
masks) are left out: they follow from the config.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from brlite.checkpoint.checkpoint import weights_identity
from brlite.checkpoint.folder import read_config
from brlite.checkpoint.model_file import check_model_file
from brlite.checkpoint.stored_tensor import ALLOWED_DTYPES, PLAIN_FORMATS, LocatedTensors, TensorLocation
from brlite.checkpoint.traced_code import GraphNames, class_text, graph_names, parameter_list
from brlite.checkpoint.traced_pickle import Record, TensorValue, read_pickle, walk_tensors
from brlite.errors import ModelError
from brlite.files.quoting import MAX_EXCERPT, excerpt, one_line, reason

MAX_PICKLE_BYTES = 256 * 2**20
MAX_CODE_BYTES = 64 * 2**20  # of source files in all; a file counts each time it is read
LOCAL_HEADER = struct.Struct("<4s22x2H")  # before a member of a zip: signature, lengths of name and extra field
SIGNATURE = b"PK\x03\x04"


class TracedArchive:
    """A `.pt` file: its module, and the places of its members. Raises `ModelError` for any other file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        check_model_file(file, "zip")
        self._code_bytes_left = MAX_CODE_BYTES
        with self._opened() as archive:
            self.num_bytes = file.stat().st_size
            self._members = {info.filename: info for info in archive.infolist()}
            self._read_module(archive)

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        """The file as a zip. Opening it lists all its members, so it is opened once for all that are read."""
        try:
            archive = zipfile.ZipFile(self.file)
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise ModelError(f"{self.file}: not a traced .pt file, or cut short: {reason(error)}") from error
        with archive:
            yield archive

    def _read_module(self, archive: zipfile.ZipFile) -> None:
        file = self.file
        prefixes = [name.removesuffix("data.pkl") for name in self._members if name.endswith("/data.pkl")]
        if len(prefixes) != 1 or prefixes[0].count("/") != 1:
            raise ModelError(f"{file}: a zip file, but not a traced .pt: it has no data.pkl")
        (self._prefix,) = prefixes
        if f"{self._prefix}constants.pkl" not in self._members:
            raise ModelError(f"{file}: torch.save wrote it; a traced .pt is written by torch.jit.save")
        if f"{self._prefix}byteorder" in self._members and self._read(archive, "byteorder", 16) != b"little":
            raise ModelError(f"{file}: its numbers are big-endian, which is not supported")
        self.pickle = self._read(archive, "data.pkl", MAX_PICKLE_BYTES)
        module = read_pickle(self.pickle, file)
        if not isinstance(module, Record):
            raise ModelError(f"{file}: must hold a traced module, got {excerpt(type(module).__name__)}")
        self.module = module

    def graph_names(self) -> GraphNames | None:
        """The names of the whole graph's input and logits; None if its text cannot be read."""
        with self._opened() as archive:
            return graph_names(self._class_text(archive, self.module.type_name))

    def parameters(self) -> dict[str, TensorLocation]:
        """Every parameter of the traced module by its name, and where it is in the file."""
        lists: dict[str, str] = {}  # by class
        found = {}
        with self._opened() as archive, self.file.open("rb") as stream:
            for name, owner, value in walk_tensors(self.module, self.file):
                if owner.type_name not in lists:
                    lists[owner.type_name] = parameter_list(self._class_text(archive, owner.type_name))
                if f'"{name.rpartition(".")[2]}"' in lists[owner.type_name]:
                    found[name] = self._locate(stream, name, value)
        return found

    def _class_text(self, archive: zipfile.ZipFile, type_name: str) -> str:
        """The text of a class of the archive, such as `__torch__.transformers.….LlamaForCausalLM`."""
        path = "code/" + type_name.rpartition(".")[0].replace(".", "/") + ".py"
        try:
            text = self._read(archive, path, self._code_bytes_left)
            self._code_bytes_left -= len(text)
            return class_text(text.decode(), type_name)
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.file}: {excerpt(path)} is not text: {reason(error)}") from error

    def _locate(self, stream: BufferedReader, name: str, value: TensorValue) -> TensorLocation:
        """Where a tensor's numbers are in the file, which `stream` reads. Raises `ModelError` unless all are there."""
        storage, shape = value.storage, value.shape
        if storage.dtype not in PLAIN_FORMATS:
            found = one_line(storage.dtype, MAX_EXCERPT)
            raise ModelError(f"{self.file}: {excerpt(name)} is of {found}; allowed are {ALLOWED_DTYPES}")
        num_elements = math.prod(shape)
        in_order = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
        steps = zip(shape, value.strides, in_order, strict=True)
        if num_elements and any(size > 1 and stride != step for size, stride, step in steps):
            raise ModelError(
                f"{self.file}: {excerpt(name)} of shape {excerpt(shape)} has strides {excerpt(value.strides)}, "
                "but its rows must follow each other; convert the model's own folder"
            )
        if value.offset + num_elements > storage.num_elements:
            raise ModelError(f"{self.file}: {excerpt(name)} reaches beyond its storage {excerpt(storage.key)}")
        stored_as = PLAIN_FORMATS[storage.dtype]
        wanted = storage.num_elements * stored_as.block_bytes
        info = self._members.get(f"{self._prefix}data/{storage.key}")
        if info is None:
            raise ModelError(f"{self.file}: the numbers of storage {excerpt(storage.key)} are missing")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < wanted:
            raise ModelError(f"{self.file}: storage {excerpt(storage.key)} must have {wanted} plain bytes")
        stream.seek(info.header_offset)
        header = stream.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or not header.startswith(SIGNATURE):
            raise ModelError(f"{self.file}: broken at byte {info.header_offset}: storage {excerpt(storage.key)}")
        _, name_length, extra_length = LOCAL_HEADER.unpack(header)
        start: int = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if start + wanted > self.num_bytes:
            raise ModelError(f"{self.file}: cut short: storage {excerpt(storage.key)} ends at byte {start + wanted}")
        return TensorLocation(name, stored_as, shape, start + value.offset * stored_as.block_bytes)

    def _read(self, archive: zipfile.ZipFile, path: str, max_bytes: int) -> bytes:
        info = self._members.get(self._prefix + path)
        if info is None:
            raise ModelError(f"{self.file}: has no {excerpt(path)}")
        # A compressed member could unpack to any size. torch compresses its code only.
        if info.filename.endswith(".pkl") and info.compress_type != zipfile.ZIP_STORED:
            raise ModelError(f"{self.file}: {excerpt(info.filename)} is compressed, as torch never does")
        if info.file_size > max_bytes:
            raise ModelError(f"{self.file}: {excerpt(info.filename)} has {info.file_size} bytes, over {max_bytes}")
        try:
            with archive.open(info) as member:
                return member.read(max_bytes)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise ModelError(f"{self.file}: {excerpt(info.filename)} cannot be read: {reason(error)}") from error


class TracedCheckpoint(LocatedTensors):
    """Implements `Checkpoint`. Its `path` is the file's; the config is read from the folder."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.path = file
        self.config: dict[str, Any] = read_config(folder)
        archive = TracedArchive(file)
        super().__init__({file: list(archive.parameters().values())})
        self.identity = weights_identity(self.config, {file: archive.pickle})

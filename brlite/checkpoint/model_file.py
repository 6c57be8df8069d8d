"""Recognizes files that are not what their names say, and reads a model's small text files.

A download or a copy may leave a git-lfs pointer, a login page, a dangling link, an empty or a compressed file in place
of a model file. `KINDS` lists these by their first bytes. Every reader of model files checks this first.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from brlite.errors import ModelError
from brlite.files.quoting import excerpt, one_line, reason
from brlite.files.text_file import TextError, decode_text
from brlite.process.machine import show_bytes

HEAD_BYTES = 512
MAX_TEXT_BYTES = 128 * 2**20  # of a tokenizer.json; large vocabularies take 30 MB
MAX_JSON_BYTES = 16 * 2**20  # parsing takes up to 22 times as much; indexes of shards, the largest, have some MB
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character, as JSON writes it; without the other: no text
FETCH_AGAIN = "fetch it again"
# The template for chats with tools, beside a chat_template.jinja. A bundle has no folders: there it has another name.
TOOL_TEMPLATE_FILE, BUNDLED_TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja", "tool_use.jinja"
NO_MODELS = ("mmproj", "imatrix")  # in names of GGUF files that hold no language model
PART = re.compile(r"(.+-)\d{5}(-of-(?!00000)(\d{5})\.\w+)")  # a shard, or a part of a GGUF


class Kind(NamedTuple):
    """A kind of file: how it begins, and the text of the error if another kind is expected."""

    name: str
    begins: bytes | Callable[[bytes], bool]
    text: str | Callable[[bytes], str]

    def matches(self, head: bytes) -> bool:
        return self.begins(head) if callable(self.begins) else head.startswith(self.begins)

    def describe(self, head: bytes) -> str:
        return self.text(head) if callable(self.text) else self.text


_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head", b"<error")
# What hubs and mirrors send in place of a file.
_MESSAGES = (b"Entry not found", b"Repository not found", b"Invalid username or password", b"Access to model")
_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")


def _lfs_text(head: bytes) -> str:
    size = re.search(rb"\nsize (\d{1,18})\n", head)
    missing = f" ({show_bytes(int(size[1]))} are missing)" if size else ""
    return f"is a git-lfs pointer{missing}: git lfs pull"


# The first that matches counts.
KINDS: tuple[Kind, ...] = (
    Kind("empty", lambda head: not head, f"is empty: {FETCH_AGAIN}"),
    Kind("git-lfs", lambda head: head.startswith((b"version https://git-lfs.", b"version https://hawser.")), _lfs_text),
    Kind("git-annex", lambda head: b"/annex/objects/" in head[:64], "is a git-annex pointer: git annex get"),
    Kind(
        "page",
        lambda head: head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES),
        f"is a web page, as servers send in place of a file that needs a login: {FETCH_AGAIN}",
    ),
    Kind(
        "message",
        lambda head: head.startswith(_MESSAGES),
        lambda head: f"holds a server's message, {excerpt(head[:40].decode('latin-1'))}: {FETCH_AGAIN}",
    ),
    Kind("GGUF", b"GGUF", "is a GGUF file: give it a name that ends in .gguf"),
    Kind("GGML", lambda head: head[:4] in _OLD_GGML, "is a GGML file, the format before GGUF: convert it"),
    Kind("packed weights", b"brlite\x00\x01", "holds packed weights of brlite (serialize_file), not a model"),
    Kind("safetensors", lambda head: head[4:10] == b'\0\0\0\0{"', "is a safetensors file: name it so"),
    Kind("zip", b"PK\x03\x04", "is a zip archive: unpack it"),
    Kind("gzip", b"\x1f\x8b", "is compressed by gzip: unpack it"),
    Kind("zstd", b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it"),
    Kind("xz", b"\xfd7zXZ\x00", "is compressed by xz: unpack it"),
    Kind("bzip2", b"BZh", "is compressed by bzip2: unpack it"),
    Kind("7z", b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it"),
    Kind("tar", lambda head: head[257:262] == b"ustar", "is a tar archive: unpack it"),
    Kind("HDF5", b"\x89HDF\r\n", "is an HDF5 file, of Keras or TensorFlow: use the model's safetensors"),
    Kind(
        "pickle",
        lambda head: head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")),
        "is a bare pickle, as torch.save wrote before PyTorch 1.6: it could run code and is not read",
    ),
    Kind(
        "zeros",
        lambda head: len(head) == HEAD_BYTES and not any(head),
        f"begins with zeros only, as an unfinished download does: {FETCH_AGAIN}",
    ),
)


def check_model_file(path: Path, *wanted: str) -> None:
    """Raise `ModelError` for a file that is missing, unreadable or of a known kind that is not `wanted`.

    A file of no known kind passes: its reader reports what is wrong with it.
    """
    if described := describe_file(path, *wanted):
        raise ModelError(f"{path}: {described}")


def describe_file(path: Path, *wanted: str) -> str | None:
    """What the file is instead of the `wanted` kinds, and what to do about it; None for a wanted or unknown kind."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe that has no writer must not block
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                return "is a directory, not a file" if stat.S_ISDIR(mode) else "is a pipe or a device, not a file"
            head = os.read(handle, HEAD_BYTES)
        finally:
            os.close(handle)
    except FileNotFoundError:
        if path.is_symlink():
            return f"is a link to {one_line(os.readlink(path))}, which is not there: {FETCH_AGAIN}"
        return "the file is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {reason(error)}"
    kind = next((kind for kind in KINDS if kind.matches(head)), None)
    return None if kind is None or kind.name in wanted else kind.describe(head)


def exists(path: Path) -> bool:
    """Whether a folder lists the name. Also True for a dangling link: the reader then reports it."""
    return os.path.lexists(path)


def is_gguf(file: Path) -> bool:
    """Whether a file is named `.gguf`, or begins as one: the names of Ollama's files are hashes."""
    if file.suffix.lower() == ".gguf":
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False  # its reader reports why


def first_part(name: str) -> str:
    """The name of the first part of a split GGUF, or of the first shard, by that of any; of a whole file its own."""
    part = PART.fullmatch(name)
    return name if part is None else f"{part[1]}00001{part[2]}"


def part_names(name: str) -> list[str]:
    """The names of all parts or shards by the name of any; of a whole file its own. Paths are kept."""
    part = PART.fullmatch(name)
    return [name] if part is None else [f"{part[1]}{number:05}{part[2]}" for number in range(1, int(part[3]) + 1)]


def gguf_models(names: Iterable[str]) -> list[str]:
    """Of these names or paths of files, the GGUF files that hold a language model, in order.

    Of a split one it is the first part, also where that is missing.
    """
    files = sorted({first_part(name) for name in names if name.lower().endswith(".gguf")})
    return [file for file in files if not any(word in file.lower().rpartition("/")[2] for word in NO_MODELS)]


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files in a folder, as `gguf_models` chooses them."""
    return [folder / name for name in gguf_models(file.name for file in folder.iterdir())]


def read_model_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of one of a model's small files. Raises `ModelError` naming the file."""
    check_model_file(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ModelError(f"{path}: is too long (allowed: {max_bytes} bytes)")
        return decode_text(content)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {reason(error)}") from None
    except TextError as error:
        raise ModelError(f"{path}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in one of a model's JSON files. Raises `ModelError` naming the file."""
    text = read_model_text(path, MAX_JSON_BYTES)
    try:
        content = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()  # a lone one must fail here, not when it is used
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {reason(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {excerpt(content)}")
    return content

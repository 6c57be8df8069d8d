"""What a model's file turns out to be: one table, asked by the reader of every format."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.gguf_header import read_gguf_header
from brlite.checkpoint.model_file import describe_file, read_json_object
from brlite.checkpoint.traced_checkpoint import TracedArchive
from brlite.errors import ModelError
from brlite.tokenizer import load_tokenizer
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 269060552\n"
)


def a_tar() -> bytes:
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return data.getvalue()


def a_zip() -> bytes:
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("notes.txt", "not a model")
    return data.getvalue()


CONTENTS = {
    "git-lfs pointer": (LFS_POINTER, r"git-lfs pointer \(269 MB are missing\): git lfs pull"),
    "git-annex pointer": (b"/annex/objects/SHA256E-s5--abc\n", "git-annex pointer: git annex get"),
    "HTML": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    "a server's message": (b"Entry not found", "a server's message, 'Entry not found'"),
    "empty": (b"", "is empty"),
    "gzip": (gzip.compress(b"{}"), "compressed by gzip"),
    "tar": (a_tar(), "tar archive"),
    "zeros": (bytes(4096), "begins with zeros only"),
    "pickle": (b"\x80\x02}q\x00.", "bare pickle"),
    "packed weights": (b"brlite\x00\x01" + bytes(100), "packed weights of brlite"),
}


def safetensors(folder: Path, file: Path) -> object:
    shutil.move(file, folder / "model.safetensors")
    return open_checkpoint(folder)


def sharded(folder: Path, file: Path) -> object:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "part.safetensors"}}')
    shutil.move(file, folder / "part.safetensors")
    return open_checkpoint(folder)


def torch_bin(folder: Path, file: Path) -> object:
    (folder / "model.safetensors").unlink()
    shutil.move(file, folder / "pytorch_model.bin")
    return open_checkpoint(folder)


def gguf(folder: Path, file: Path) -> object:
    return read_gguf_header(Path(shutil.move(file, folder / "m.gguf")))


def traced(folder: Path, file: Path) -> object:
    return TracedArchive(Path(shutil.move(file, folder / "m.pt")))


def config_json(folder: Path, file: Path) -> object:
    shutil.move(file, folder / "config.json")
    return open_checkpoint(folder)


def tokenizer_json(folder: Path, file: Path) -> object:
    shutil.move(file, folder / "tokenizer.json")
    return load_tokenizer(folder)


def tokenizer_config(folder: Path, file: Path) -> object:
    shutil.move(file, folder / "tokenizer_config.json")
    return load_tokenizer(folder)


def sentencepiece(folder: Path, file: Path) -> object:
    (folder / "tokenizer.json").unlink()
    shutil.move(file, folder / "tokenizer.model")
    return load_tokenizer(folder)


def template(folder: Path, file: Path) -> object:
    shutil.move(file, folder / "chat_template.jinja")
    return load_tokenizer(folder)


def manifest(folder: Path, file: Path) -> object:
    shutil.move(file, folder / "brlite-manifest.json")
    return open_checkpoint(folder)


Read = Callable[[Path, Path], object]
READERS: tuple[Read, ...] = (
    *(safetensors, sharded, torch_bin, gguf, traced, config_json),
    *(tokenizer_json, tokenizer_config, sentencepiece, template, manifest),
)
each_reader = pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "model", "llama")
    write_byte_tokenizer(folder)
    return folder


@each_reader
@pytest.mark.parametrize("content", CONTENTS)
def test_every_reader_says_what_its_file_turns_out_to_be(content: str, read: Read, model: Path, tmp_path: Path) -> None:
    data, expected = CONTENTS[content]
    (tmp_path / "found").write_bytes(data)

    with pytest.raises(ModelError, match=expected) as refusal:
        read(model, tmp_path / "found")

    assert "\n" not in str(refusal.value)


@each_reader
def test_every_reader_says_that_a_link_leads_nowhere(read: Read, model: Path, tmp_path: Path) -> None:
    (tmp_path / "found").symlink_to("../blobs/4d7a")

    with pytest.raises(ModelError, match=r"is a link to \.\./blobs/4d7a, which is not there"):
        read(model, tmp_path / "found")


@each_reader
def test_every_reader_refuses_a_pipe_at_once(read: Read, model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "found")

    with pytest.raises(ModelError, match="is a pipe or a device"):
        read(model, tmp_path / "found")


@pytest.mark.parametrize("read", [reader for reader in READERS if reader not in (torch_bin, traced)])
def test_an_archive_is_refused_where_none_is_wanted(read: Read, model: Path, tmp_path: Path) -> None:
    (tmp_path / "found").write_bytes(a_zip())

    with pytest.raises(ModelError, match="is a zip archive"):
        read(model, tmp_path / "found")


def test_a_directory_and_a_missing_file_are_told(tmp_path: Path) -> None:
    assert describe_file(tmp_path) == "is a directory, not a file"
    assert describe_file(tmp_path / "absent") == "the file is missing"
    assert describe_file(tmp_path / "a\0b") is not None


@pytest.mark.parametrize("text", ["hello", '{"abcd":{"x":1}}', '{"a": 1}', "BZ is no archive", "PK"])
def test_a_text_is_taken_for_nothing_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)

    assert describe_file(tmp_path / "file") is None


def test_a_json_file_of_a_model_may_have_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{\r\n"a": 1\r\n}')

    assert read_json_object(tmp_path / "config.json") == {"a": 1}


def test_a_json_file_in_utf_16_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-16")

    with pytest.raises(ModelError, match=r"config\.json: it is UTF-16 text; UTF-8 is needed"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_whose_files_have_a_mark_is_the_model_without(name: str, model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"{{ messages[0].content }}")
    config, tokenizer = open_checkpoint(model).config, load_tokenizer(model)
    if (model / name).exists():
        (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())

    assert open_checkpoint(model).config == config
    assert load_tokenizer(model).encode("hello") == tokenizer.encode("hello")


def test_a_models_own_template_may_have_a_mark(model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")

    ids = load_tokenizer(model).encode_chat([{"role": "user", "content": "hi"}])

    assert ids == load_tokenizer(model).encode("hi", add_special_tokens=False)


def test_a_json_file_that_is_too_long_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'{"w":[' + b"[]," * 6_000_000 + b"[]]}")

    with pytest.raises(ModelError, match=r"config.json: is too long .allowed: 16777216 bytes"):
        read_json_object(file)

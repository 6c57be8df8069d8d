"""A checkpoint's identity stays while its files stay, and changes with anything that could change the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from brlite.checkpoint import open_checkpoint
from tests.checkpoint.model_files import (
    CONFIG,
    random_tensors,
    write_bin,
    write_gguf,
    write_safetensors,
    write_sharded_safetensors,
)

pytestmark = pytest.mark.torch

WRITERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda folder: write_safetensors(folder, random_tensors()) / "model.safetensors",
    "shards": lambda folder: sorted(write_sharded_safetensors(folder, random_tensors()).glob("*.safetensors"))[-1],
    "bin": lambda folder: write_bin(folder, random_tensors()) / "pytorch_model.bin",
    "gguf": lambda folder: write_gguf(folder / "model.gguf"),
}

each_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def identity(folder: Path) -> str:
    return open_checkpoint(folder).identity


def replace_bytes(file: Path, old: bytes, new: bytes) -> None:
    """Change bytes and nothing else that the file system tells of a file."""
    status, content = file.stat(), file.read_bytes()
    assert len(old) == len(new)
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@each_format
def test_the_same_files_have_the_same_identity_wherever_they_are(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    write(folder)
    first = identity(folder)

    moved = folder.rename(tmp_path / "there")

    assert identity(moved) == first
    assert len(first) == 32
    assert int(first, 16) > 0


@each_format
def test_a_touched_file_is_another(write: Callable[[Path], Path], tmp_path: Path) -> None:
    file = write(tmp_path)
    before = identity(tmp_path)

    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))

    assert identity(tmp_path) != before


@pytest.mark.parametrize("name", ["safetensors", "shards", "gguf"])
def test_other_weights_of_the_same_size_time_and_header_are_another(name: str, tmp_path: Path) -> None:
    file = WRITERS[name](tmp_path)
    before, last = identity(tmp_path), file.read_bytes()[-file.stat().st_size // 8 :]

    replace_bytes(file, last, bytes(255 - byte for byte in last))

    assert identity(tmp_path) != before


def test_a_renamed_file_is_another(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    before = identity(tmp_path)

    file.rename(tmp_path / "other.gguf")

    assert identity(tmp_path) != before


def test_a_changed_byte_of_a_safetensors_header_is_enough(tmp_path: Path) -> None:
    file = WRITERS["safetensors"](tmp_path)
    before = identity(tmp_path)

    replace_bytes(file, b"lm_head.weight", b"lm_tail.weight")

    assert identity(tmp_path) != before


def test_a_changed_byte_of_a_gguf_header_is_enough(tmp_path: Path) -> None:
    file = WRITERS["gguf"](tmp_path)
    before = identity(tmp_path)

    replace_bytes(file, b"blk.0.attn_norm.weight", b"blk.1.attn_norm.weight")

    assert identity(tmp_path) != before


def test_a_changed_config_is_another(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors())
    before = identity(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 1.5}))

    assert identity(tmp_path) != before


def test_a_config_written_in_another_order_is_the_same(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors())
    before = identity(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(CONFIG.items())), indent=3))

    assert identity(tmp_path) == before

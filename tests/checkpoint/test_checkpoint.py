"""What was written comes back, whatever the format, and never more of it than one tensor at a time."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from brlite.checkpoint import open_checkpoint
from tests.checkpoint.model_files import (
    CONFIG,
    random_tensors,
    write_bin,
    write_gguf,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)

Writer = Callable[[Path, dict[str, torch.Tensor]], Path]

each_format = pytest.mark.parametrize(
    "write", [write_safetensors, write_sharded_safetensors, write_bin, write_sharded_bin]
)


@each_format
def test_tensors_come_back_as_they_were_written(write: Writer, tmp_path: Path) -> None:
    tensors = random_tensors()

    checkpoint = open_checkpoint(write(tmp_path, tensors))
    read = dict(checkpoint.tensors())
    checkpoint.close()

    assert checkpoint.config == CONFIG
    assert checkpoint.path == tmp_path
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items())


@each_format
def test_shapes_are_known_before_any_tensor_is_read(write: Writer, tmp_path: Path) -> None:
    tensors = random_tensors()

    shapes = open_checkpoint(write(tmp_path, tensors)).shapes()

    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@each_format
def test_size_on_disk_is_at_least_that_of_the_tensors(write: Writer, tmp_path: Path) -> None:
    tensors = random_tensors()

    num_bytes = open_checkpoint(write(tmp_path, tensors)).num_bytes

    assert num_bytes >= sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("format_name", ["safetensors", "bin", "gguf"])
def test_no_tensor_outlives_the_callers_interest(format_name: str, tmp_path: Path) -> None:
    writers: dict[str, Callable[[], Path]] = {
        "safetensors": lambda: write_safetensors(tmp_path, random_tensors()),
        "bin": lambda: write_bin(tmp_path, random_tensors()),
        "gguf": lambda: write_gguf(tmp_path / "model.gguf"),
    }
    checkpoint = open_checkpoint(writers[format_name]())

    handed_out: list[weakref.ref[torch.Tensor]] = []
    num_alive = []
    for _, tensor in checkpoint.tensors():
        handed_out.append(weakref.ref(tensor))
        num_alive.append(sum(reference() is not None for reference in handed_out))

    assert len(num_alive) >= 3
    assert max(num_alive) == 1


def test_tensors_can_be_read_twice(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_bin(tmp_path, random_tensors()))

    first, second = (dict(checkpoint.tensors()) for _ in range(2))

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    write_bin(tmp_path, {"old": torch.zeros(1)})
    write_sharded_safetensors(tmp_path, {"new": torch.zeros(1)})

    shapes = open_checkpoint(tmp_path).shapes()

    assert shapes == {"new": (1,)}


def test_an_empty_tensor_takes_no_place(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(0, 3), "b": torch.ones(2), "c": torch.zeros(0)}

    read = dict(open_checkpoint(write_safetensors(tmp_path, tensors)).tensors())

    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {"a": (0, 3), "b": (2,), "c": (0,)}


def test_a_folder_with_one_gguf_file_is_a_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")

    checkpoint = open_checkpoint(tmp_path)

    assert checkpoint.path == file
    assert checkpoint.config["model_type"] == "llama"


def test_importing_the_room_imports_no_torch() -> None:
    program = "import sys, brlite.checkpoint, brlite.checkpoint.fetch; print('torch' in sys.modules)"

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "False"

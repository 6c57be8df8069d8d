"""What was written comes back as float32, whatever the format, and never more of it than one tensor at a time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from brlite.checkpoint import open_checkpoint
from brlite.errors import ModelError
from tests.checkpoint.model_files import (
    CONFIG,
    random_tensors,
    write_bin,
    write_gguf,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)
from tests.load_plans import read_tensors
from tests.quantized_folders import CASES, write_folder
from tests.tiny_models import write_tiny_model

Writer = Callable[[Path, dict[str, torch.Tensor]], Path]

each_format = pytest.mark.parametrize(
    "write", [write_safetensors, write_sharded_safetensors, write_bin, write_sharded_bin]
)


@each_format
def test_tensors_come_back_widened_to_float32(write: Writer, tmp_path: Path) -> None:
    tensors = random_tensors()

    checkpoint = open_checkpoint(write(tmp_path, tensors))
    read = read_tensors(checkpoint)

    assert checkpoint.config == CONFIG
    assert checkpoint.path == tmp_path
    assert read.keys() == tensors.keys()
    assert all(array.dtype == np.float32 and array.flags.carray for array in read.values())
    assert all(np.array_equal(read[name], tensor.float().numpy()) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["plain", "bin", "gguf", "quantized"])
def test_a_file_that_is_written_while_it_is_read_is_refused(name: str, tmp_path: Path) -> None:
    if name == "quantized":
        write_folder(tmp_path, CASES["gptq"])
    elif name == "gguf":
        write_gguf(tmp_path / "model.gguf")
    else:
        (write_bin if name == "bin" else write_safetensors)(tmp_path, random_tensors())
    (file,) = (file for file in tmp_path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))
    checkpoint = open_checkpoint(tmp_path)

    os.utime(file, ns=(1, 1))

    with pytest.raises(ModelError, match=r"model\.\w+: has changed since it was opened"):
        read_tensors(checkpoint)


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_bin])
def test_shards_need_no_index(write: Writer, tmp_path: Path) -> None:
    folder = write(tmp_path, random_tensors())
    with_index = read_tensors(open_checkpoint(folder))
    next(folder.glob("*.index.json")).unlink()

    without_index = read_tensors(open_checkpoint(folder))

    assert without_index.keys() == with_index.keys()
    assert all(np.array_equal(without_index[name], array) for name, array in with_index.items())


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

    handed_out: list[weakref.ref[np.ndarray]] = []
    num_alive = []
    for tensor in checkpoint.tensors():
        values = tensor.float32()
        handed_out.append(weakref.ref(values))
        num_alive.append(sum(reference() is not None for reference in handed_out))

    assert len(num_alive) >= 3
    assert max(num_alive) == 1


def test_tensors_can_be_read_twice(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_bin(tmp_path, random_tensors()))

    first, second = (read_tensors(checkpoint) for _ in range(2))

    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_of_a_type_survives_across_pieces(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16))
    halves = bits.view(torch.float16 if dtype == torch.float32 else dtype)
    tensor = halves.repeat(33).reshape(33, 2**16).to(dtype)  # more than one piece

    read = read_tensors(open_checkpoint(write_safetensors(tmp_path, {"w": tensor})))["w"]

    assert np.array_equal(read, tensor.float().numpy(), equal_nan=True)


def test_a_transposed_tensor_of_a_bin_file_comes_back_in_row_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T

    read = read_tensors(open_checkpoint(write_bin(tmp_path, {"w": tensor})))["w"]

    assert read.flags.c_contiguous
    assert read.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("format_name", ["safetensors", "gguf"])
def test_a_file_that_is_cut_after_it_was_opened_is_refused(format_name: str, tmp_path: Path) -> None:
    if format_name == "gguf":
        file = write_gguf(tmp_path / "model.gguf")
    else:
        file = write_safetensors(tmp_path, random_tensors()) / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])

    with pytest.raises(ModelError, match=f"{file.name}: ends at byte"):
        read_tensors(checkpoint)


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    write_bin(tmp_path, {"old": torch.zeros(1)})
    write_sharded_safetensors(tmp_path, {"new": torch.zeros(1)})

    shapes = open_checkpoint(tmp_path).shapes()

    assert shapes == {"new": (1,)}


def test_an_empty_tensor_takes_no_place(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(0, 3), "b": torch.ones(2), "c": torch.zeros(0)}

    read = read_tensors(open_checkpoint(write_safetensors(tmp_path, tensors)))

    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {"a": (0, 3), "b": (2,), "c": (0,)}


def test_a_folder_with_one_gguf_file_is_a_model(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")

    checkpoint = open_checkpoint(tmp_path)

    assert checkpoint.path == file
    assert checkpoint.config["model_type"] == "llama"


READ_ALL = """
import sys
from pathlib import Path
from brlite.checkpoint import fetch, open_checkpoint
from brlite.models.registry import find_family
from brlite.models.rope_tables import pair_tables
from tests.load_plans import read_tensors

for path in sys.argv[1:]:
    checkpoint = open_checkpoint(Path(path))
    print(sum(tensor.float32().size for tensor in checkpoint.tensors()), len(checkpoint.identity))
    pair_tables(find_family(checkpoint.config).read_config(checkpoint.config).rope, 16)
print("torch" in sys.modules)
"""


def test_weights_and_rope_tables_are_read_without_importing_torch(tmp_path: Path) -> None:
    paths = [write_gguf(tmp_path / "model.gguf"), write_tiny_model(tmp_path / "tiny")]
    sizes = [sum(map(math.prod, open_checkpoint(path).shapes().values())) for path in paths]

    command = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert printed.split() == [str(sizes[0]), "32", str(sizes[1]), "32", "False"]

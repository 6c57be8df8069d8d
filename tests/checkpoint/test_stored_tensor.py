"""Parts of a stored tensor are what cutting the whole one would give, whatever its format, and no more is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from brlite.checkpoint import open_checkpoint, stored_tensor
from brlite.checkpoint.stored_tensor import F32, Float32, StoredTensor, tensor_in_memory
from tests.checkpoint.model_files import write_gguf
from tests.load_plans import read_tensors
from tests.tiny_models import LLAMA, random_tensors, write_tiny_model

NAME = "model.layers.1.mlp.down_proj.weight"
MATRIX_PARTS = [(range(3, 17), range(5, 40)), (range(64), None), (range(9, 10), range(95, 96)), (range(4, 4), None)]


def cut(values: Float32, rows: range, columns: range | None) -> Float32:
    chosen = values[rows.start : rows.stop]
    return chosen if columns is None else chosen[:, columns.start : columns.stop]


def find(tensors: Iterator[StoredTensor], name: str) -> Iterator[StoredTensor]:
    return (tensor for tensor in tensors if tensor.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_part_is_that_part_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    path = write_tiny_model(tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(LLAMA).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(stored_tensor, "CHUNK_ELEMENTS", 200)  # of a row of 96: two at a time
    whole = tensors[NAME].float().numpy()

    for tensor in find(open_checkpoint(path).tensors(), NAME):
        for rows, columns in MATRIX_PARTS:
            part = tensor.part(rows, columns)

            assert part.shape == cut(whole, rows, columns).shape
            np.testing.assert_array_equal(part.float32(), cut(whole, rows, columns))


def test_a_part_of_a_part_is_counted_from_the_part(tmp_path: Path) -> None:
    whole = random_tensors(LLAMA)[NAME].numpy()
    tensor = tensor_in_memory(NAME, F32, whole.shape, whole.reshape(-1).view(np.uint8))

    inner = tensor.part(range(8, 40), range(16, 64)).part(range(5, 9), range(3, 7))

    np.testing.assert_array_equal(inner.float32(), whole[13:17, 19:23])


def test_a_part_of_a_vector_is_some_of_its_numbers(tmp_path: Path) -> None:
    whole = random_tensors(LLAMA)["model.norm.weight"].numpy()

    for tensor in find(open_checkpoint(write_tiny_model(tmp_path)).tensors(), "model.norm.weight"):
        part = tensor.part(range(7, 30))

        assert part.shape == (23,)
        np.testing.assert_array_equal(part.float32(), whole[7:30])


def test_what_float32_gives_is_the_callers_own() -> None:
    data = np.ones((2, 3), np.float32)
    tensor = tensor_in_memory("w", F32, (2, 3), data.reshape(-1).view(np.uint8))

    tensor.float32()[...] = 0

    assert data.all()


@pytest.mark.parametrize("rows", [range(1), range(3, 20), range(16, 32), range(5, 32)])
def test_rows_of_a_gguf_files_heads_come_in_the_order_of_hugging_face(rows: range, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf"))
    whole = read_tensors(checkpoint)[name]

    for tensor in find(checkpoint.tensors(), name):
        np.testing.assert_array_equal(tensor.part(rows).float32(), whole[rows.start : rows.stop])


def test_a_four_bit_tensor_gives_its_bytes_as_they_are_stored() -> None:
    values = np.random.default_rng(1).standard_normal((6, 64), np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    quantized = gguf.quants.quantize(values, kind)
    stored_as = stored_tensor.Format("Q4_0", 32, 18, lambda data: gguf.quants.dequantize(data, kind))
    tensor = tensor_in_memory("w", stored_as, (6, 64), quantized.reshape(-1))

    part = tensor.part(range(2, 5))

    np.testing.assert_array_equal(tensor.stored(part.rows), quantized[2:5])
    np.testing.assert_array_equal(part.float32(), gguf.quants.dequantize(quantized, kind)[2:5])


def test_rows_of_length_one_do_not_depend_on_what_is_read_with_them() -> None:
    values = np.random.default_rng(2).standard_normal((40, 4099), np.float32)
    values[7] = 0
    tensor = tensor_in_memory("head", F32, values.shape, values.reshape(-1).view(np.uint8))
    scaled = msgspec.structs.replace(tensor, has_unit_rows=True)

    whole = scaled.float32()

    np.testing.assert_allclose(np.linalg.norm(np.delete(whole, 7, axis=0), axis=1), 1, rtol=1e-6)
    assert not whole[7].any()
    for row in range(40):
        np.testing.assert_array_equal(scaled.part(range(row, row + 1)).float32()[0], whole[row])


def test_rows_that_are_not_wanted_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read: list[int] = []
    read = stored_tensor.read_bytes
    monkeypatch.setattr(stored_tensor, "read_bytes", lambda *place: num_read.append(place[-1]) or read(*place))

    for tensor in find(open_checkpoint(write_tiny_model(tmp_path)).tensors(), NAME):
        tensor.part(range(2)).float32()

    assert sum(num_read) == 2 * 96 * 4

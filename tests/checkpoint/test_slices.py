"""Parts of a checkpoint's tensors are what cutting the whole ones would give, whoever does the cutting."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from brlite.checkpoint import open_checkpoint, stored_numbers
from brlite.checkpoint.slices import Slice, SlicesItself, read_cuts
from tests.tiny_models import LLAMA, TensorCheckpoint, random_tensors, write_tiny_model

NAME = "model.layers.1.mlp.down_proj.weight"
CUTS = {
    NAME: [Slice(range(3, 17), range(5, 40)), Slice(range(64)), Slice(range(9, 10), range(95, 96)), Slice(range(4, 4))],
    "model.norm.weight": [Slice(range(7, 30))],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cut_is_that_part_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    path = write_tiny_model(tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(LLAMA).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(stored_numbers, "CHUNK_ELEMENTS", 200)  # of a row of 96: two at a time
    with closing(open_checkpoint(path)) as checkpoint:
        assert isinstance(checkpoint, SlicesItself)
        found = list(read_cuts(checkpoint, CUTS))

    assert {(name, cut) for name, cut, _ in found} == {(name, cut) for name, cuts in CUTS.items() for cut in cuts}
    for name, cut, values in found:
        np.testing.assert_array_equal(values, cut.of(tensors[name].float().numpy()))


def test_a_format_that_cannot_is_cut_for() -> None:
    checkpoint = TensorCheckpoint.tiny()
    whole = dict(checkpoint.tensors())

    found = list(read_cuts(checkpoint, CUTS))

    assert not isinstance(checkpoint, SlicesItself)
    assert len(found) == 5
    for name, cut, values in found:
        np.testing.assert_array_equal(values, cut.of(whole[name]))
        values[...] = 0  # a copy: writing to it leaves the tensor as it is
    assert whole[NAME].any()


def test_rows_that_are_not_wanted_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read: list[int] = []
    read = stored_numbers.read_bytes
    monkeypatch.setattr(
        stored_numbers, "read_bytes", lambda stream, begin, size: num_read.append(size) or read(stream, begin, size)
    )
    with closing(open_checkpoint(write_tiny_model(tmp_path))) as checkpoint:
        list(read_cuts(checkpoint, {NAME: [Slice(range(2))]}))

    assert sum(num_read) == 2 * 96 * 4

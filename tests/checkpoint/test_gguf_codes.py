"""Quantized blocks taken apart: scale · code + minimum is what the `gguf` package dequantizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from brlite.checkpoint.gguf_codes import BLOCKS, CODINGS
from brlite.checkpoint.stored_tensor import Format, LocatedTensors, StoredTensor, TensorLocation
from brlite.errors import ModelError
from tests.quantized_files import RANDOM_BLOCKS, SUPER_BLOCKS, quantize

GROUP = 32


def values_of(name: str, stored: np.ndarray) -> np.ndarray:
    """The weights that the codes stand for, in float64."""
    form, decode = CODINGS[name].form, CODINGS[name].decode
    codes, scales, minimums = decode(stored)
    scales = scales.view(np.float16).astype(np.float64).repeat(GROUP, axis=1)
    if form == "int8_f16":
        return codes.view(np.int8) * scales
    assert codes.max() <= 15
    if form == "int4":
        return (codes.astype(np.float64) - 8) * scales
    assert minimums is not None
    return codes * scales + minimums.view(np.float16).astype(np.float64).repeat(GROUP, axis=1)


def stored_rows(name: str) -> np.ndarray:
    generator = np.random.default_rng(7)
    return quantize(generator.standard_normal((5, 512)).astype(np.float32), name, generator)


@pytest.mark.parametrize("name", sorted(CODINGS.keys() - {*SUPER_BLOCKS}))
def test_codes_and_scales_are_the_weights_exactly(name: str) -> None:
    stored = stored_rows(name)

    # The package rounds scale · code + minimum to float32.
    assert np.array_equal(
        values_of(name, stored).astype(np.float32), gguf.quants.dequantize(stored, GGMLQuantizationType[name])
    )


@pytest.mark.parametrize(("name", "factors"), [("Q4_K", {0: 63 * 15, 2: 63}), ("IQ4_XS", {0: 32 * 127})])
def test_the_scales_and_minimums_of_super_blocks_are_rounded_to_half_precision(
    name: str, factors: dict[int, int]
) -> None:
    stored = stored_rows(name)
    expected = gguf.quants.dequantize(stored, GGMLQuantizationType[name])
    blocks = stored.reshape(-1, RANDOM_BLOCKS[name][0])
    largest = sum(
        factor * blocks[:, at : at + 2].copy().view("<f2").max().astype(np.float64) for at, factor in factors.items()
    )

    error = np.abs(values_of(name, stored) - expected).max()

    assert 0 < error < largest * 2.0**-11


@pytest.mark.parametrize(
    ("name", "at"), [("Q4_0", 0), ("Q4_1", 2), ("Q8_0", 0), ("Q4_K", 0), ("Q4_K", 2), ("IQ4_NL", 0), ("IQ4_XS", 0)]
)
@pytest.mark.parametrize("damage", [np.inf, np.nan, 65504.0])
def test_a_scale_or_minimum_beyond_half_precision_is_refused(name: str, at: int, damage: float, tmp_path: Path) -> None:
    stored = stored_rows(name)
    stored[3, at : at + 2] = np.array([damage], "<f2").view(np.uint8)
    if name == "Q4_K":
        stored[3, 4:16] = 63  # the scales and minimums of 8 groups, which multiply it
    if name == "IQ4_XS":
        stored[3, 2:8] = 255  # the same: 63 - 32
    tensors = written(tmp_path / "m.gguf", name, stored)
    tensor = next(tensors)

    if damage == 65504.0 and name not in SUPER_BLOCKS:
        coded = tensor.coded()
        assert (coded.scales if at == 0 else coded.offsets)[3, 0] == 0x7BFF  # the largest number of half precision
    else:
        with pytest.raises(
            ModelError, match=r"/m.gguf: 'w' has a scale that is not finite, or is beyond half precision$"
        ):
            tensor.coded()


@pytest.mark.parametrize(
    ("name", "at"), [("Q4_K", 0), ("Q4_K", 2), ("Q6_K", 208), ("IQ4_NL", 0), ("IQ4_XS", 0), ("MXFP4", 0)]
)
def test_blocks_are_the_files_and_a_number_that_is_not_finite_is_refused(name: str, at: int, tmp_path: Path) -> None:
    stored = stored_rows(name)

    for tensor in written(tmp_path / "m.gguf", name, stored):
        assert np.array_equal(tensor.blocks().reshape(stored.shape), stored)

    damage = np.array([255], np.uint8) if name == "MXFP4" else np.array([np.inf], "<f2").view(np.uint8)
    stored[3, -RANDOM_BLOCKS[name][0] + at :][: len(damage)] = damage
    for tensor in written(tmp_path / "m.gguf", name, stored):
        with pytest.raises(ModelError, match=r"/m.gguf: 'w' has a scale that is not finite$"):
            tensor.blocks()


def test_an_exponent_beyond_half_precision_is_refused_and_a_small_one_becomes_zero(tmp_path: Path) -> None:
    stored = stored_rows("MXFP4")
    stored[3, : 3 * 17 : 17] = 143, 104, 102  # half of scales of 2^16, 2^-23 and 2^-25
    for tensor in written(tmp_path / "m.gguf", "MXFP4", stored):
        assert tensor.coded().scales[3, :3].view(np.float16).tolist() == [2.0**15, 2.0**-24, 0]

    stored[3, 0] = 144
    for tensor in written(tmp_path / "m.gguf", "MXFP4", stored):
        with pytest.raises(ModelError, match=r"beyond half precision$"):
            tensor.coded()


def written(file: Path, name: str, stored: np.ndarray) -> Iterator[StoredTensor]:
    """The one tensor of a file that has these rows."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    decode = CODINGS[name].decode if name in CODINGS else None
    are_finite = BLOCKS[name].are_finite if name in BLOCKS else None
    stored_as = Format(name, block_elements, block_bytes, lambda data: data.view("<f4"), decode, are_finite)
    file.write_bytes(stored.tobytes())
    shape = len(stored), stored.shape[1] // block_bytes * block_elements
    return LocatedTensors({file: [TensorLocation("w", stored_as, shape)]}).tensors()

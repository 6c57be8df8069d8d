"""Rounding to bfloat16 against torch's and the kernels' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brlite.backends.native.abi import BF16
from brlite.backends.native.library import NativeLibrary
from brlite.checkpoint.stored_tensor import from_bfloat16, to_bfloat16

NUM_INPUTS = 2048


def every_kind_of_number() -> np.ndarray:
    """Random bits: NaN, infinities and subnormal numbers among them; then halves between two bfloat16 numbers."""
    bits = np.random.default_rng(0).integers(0, 2**32, NUM_INPUTS, np.uint32)
    bits[:8] = [0x7F800001, 0xFFC00000, 0x7F7FFFFF, 0x7F800000, 1, 0x807FFFFF, 0x3F808000, 0x3F818000]
    return bits.view(np.float32)


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    values = every_kind_of_number()

    rounded = from_bfloat16(to_bfloat16(values))

    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(rounded, expected)


def test_exact_numbers_stay_as_they_are() -> None:
    halves = np.arange(2**16, dtype=np.uint32).astype(np.uint16)

    np.testing.assert_array_equal(to_bfloat16(from_bfloat16(halves)), halves)


def test_what_kernels_read_is_rounded_as_they_round(native_library: NativeLibrary) -> None:
    library, values = native_library.functions, every_kind_of_number()
    panel = np.zeros(library.brlite_packed_bytes(BF16, 1, NUM_INPUTS), np.uint8)
    expected = np.zeros(NUM_INPUTS, np.float32)
    library.brlite_pack(BF16, values.ctypes.data, 0, 1, NUM_INPUTS, panel.ctypes.data)
    library.brlite_unpack_row(BF16, panel.ctypes.data, 0, NUM_INPUTS, expected.ctypes.data)

    rounded = from_bfloat16(to_bfloat16(values, keeps_subnormal=False))

    np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3)])
def test_arrays_keep_their_shape(shape: tuple[int, ...]) -> None:
    assert to_bfloat16(np.ones(shape, np.float32)).shape == shape

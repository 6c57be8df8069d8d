from __future__ import annotations

import pytest
import torch

from brlite.backends.torch.kv_cache import KVCache
from brlite.models.config import KVDtype, kv_bytes_per_token
from tests.models.steps import DEVICE, load_tiny

CONFIG = load_tiny("llama").config


def make_cache(dtype: KVDtype) -> KVCache:
    return KVCache(CONFIG, num_blocks=6, block_size=4, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_what_is_written_by_slot_is_read_by_block(dtype: KVDtype, tolerance: float) -> None:
    pages = make_cache(dtype).layers[0].keys
    heads = torch.randn(3, 2, 16)

    pages.write(torch.tensor([9, 2, 11]), heads)

    read = pages.read(torch.tensor([2, 0]), torch.float32)
    largest = heads.abs().amax()
    assert read.shape == (2, 4, 2, 16)
    for (block, offset), row in zip([(0, 1), (1, 2), (0, 3)], heads, strict=True):
        assert (read[block, offset] - row).abs().max() <= tolerance * largest * 1.001
    assert read.count_nonzero() <= 3 * 2 * 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_zero_head_stays_zero_and_a_nan_stays_a_nan(dtype: KVDtype) -> None:
    pages = make_cache(dtype).layers[0].values
    heads = torch.zeros(2, 2, 16)
    heads[1, 0, 3] = torch.nan

    pages.write(torch.tensor([0, 1]), heads)

    read = pages.read(torch.tensor([0]), torch.float32)[0]
    assert not read[0].any()
    assert read[1, 0, 3].isnan()
    assert not read[1, 1].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_clearing_a_block_makes_it_zero_in_every_layer(dtype: KVDtype) -> None:
    cache = make_cache(dtype)
    for layer in cache.layers:
        layer.keys.write(torch.tensor([4, 8]), torch.full((2, 2, 16), torch.nan))

    cache.clear(torch.tensor([1]))

    for layer in cache.layers:
        assert not layer.keys.read(torch.tensor([1]), torch.float32).any()
        assert layer.keys.read(torch.tensor([2]), torch.float32).isnan().any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_cache_takes_what_the_arithmetic_says_and_two_blocks_more(dtype: KVDtype) -> None:
    assert make_cache(dtype).num_bytes == (6 + 2) * 4 * kv_bytes_per_token(CONFIG, dtype)

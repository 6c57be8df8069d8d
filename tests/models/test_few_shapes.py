"""Steps that are filled up to few shapes, against the same steps as they are."""

from __future__ import annotations

import random

import pytest
import torch
from torch.overrides import TorchFunctionMode

from brlite.models.config import KVDtype
from tests.models.steps import BLOCK_SIZE, LENGTH, Runner, load_tiny, random_ids

NUM_SEQUENCES = 5


class Shapes(TorchFunctionMode):
    """Notes the shapes of all matrix products while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention):
            self.seen.add(tuple(args[0].shape) + tuple(args[1].shape))
        return function(*args, **(kwargs or {}))


def run(runner: Runner, *, seed: int) -> list[torch.Tensor]:
    """Logits of every token of some sequences that are computed in random chunks, in random company."""
    choose = random.Random(seed)
    texts = [random_ids(choose.randint(2, LENGTH), seed=seed + number) for number in range(NUM_SEQUENCES)]
    blocks = list(range(runner.cache.num_blocks))
    choose.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(-(-len(text) // BLOCK_SIZE))] for text in texts]
    done, logits = [0] * len(texts), []
    while unfinished := [number for number, text in enumerate(texts) if done[number] < len(text)]:
        pieces = []
        for number in choose.sample(unfinished, choose.randint(1, len(unfinished))):
            end = min(len(texts[number]), done[number] + choose.choice((1, 1, 2, 3, 7, 19)))
            pieces.append((done[number], texts[number][done[number] : end], tables[number]))
            done[number] = end
        logits += runner.step(pieces)
    return logits


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2-layer-types", "chatglm"])
def test_a_step_that_is_filled_up_computes_the_same(name: str, kv_dtype: KVDtype) -> None:
    decoder = load_tiny(name)
    plain, filled = (Runner(decoder, kv_dtype=kv_dtype, has_few_shapes=few) for few in (False, True))

    tolerance = 2e-2 if kv_dtype == "int8" else 1e-4  # rounding may change a level of int8
    for seed in range(2):
        for expected, found in zip(run(plain, seed=seed), run(filled, seed=seed), strict=True):
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_what_fills_up_is_written_to_the_scratch_block_alone() -> None:
    runner = Runner(load_tiny("llama"), has_few_shapes=True)

    runner.step([(0, random_ids(5), [7, 3]), (0, random_ids(3), [9]), (0, [4], [11])])

    written = {block for block in range(runner.cache.num_blocks + 2) if is_written(runner, block)}
    assert written == {7, 3, 9, 11, runner.cache.scratch_block}


def test_shapes_are_few_whatever_the_steps() -> None:
    plain, filled = Shapes(), Shapes()

    for shapes, has_few_shapes in ((plain, False), (filled, True)):
        runner = Runner(load_tiny("llama"), has_few_shapes=has_few_shapes)
        with shapes:
            for seed in range(4):
                run(runner, seed=seed)

    assert len(filled.seen) < len(plain.seen) / 2


def is_written(runner: Runner, block: int) -> bool:
    return any(bool(layer.keys.read(torch.tensor([block]), torch.float32).any()) for layer in runner.cache.layers)

"""Models that ranks share, by the kernels. The ranks are threads that take turns: the interpreter serves one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch
from torch import Tensor

from brlite.backends.torch.device import DeviceRules
from brlite.backends.torch.loading import load_model
from brlite.backends.torch.steps import Run
from brlite.backends.torch.triton.steps import TritonSteps
from brlite.models.shards import Shard
from tests.backends.torch.test_parallel import Table, ThreadGroup
from tests.backends.torch.triton.test_steps import MAX_ERROR, STEPS, Model, error, logits_of, make_cache, runs_of
from tests.models.steps import DEVICE, LENGTH
from tests.tiny_models import LLAMA, TINY_CONFIGS

NARROW = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
MODELS: dict[str, Model] = {
    "llama": Model({**LLAMA, **NARROW}),
    "biases, int8": Model({**TINY_CONFIGS["llama-biases"], **NARROW}, "a_bf16_w_int8"),
}


class TurnGroup(ThreadGroup):
    """A `ThreadGroup` of ranks of which one computes at a time."""

    def __init__(self, table: Table, rank: int, turn: threading.Lock) -> None:
        super().__init__(table, rank)
        self._turn = turn

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self._turn.release()
        try:
            return super().gather(tensor)
        finally:
            self._turn.acquire()

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor)).sum(dim=0))


def logits_of_ranks(model: Model, steps: Sequence[Sequence[Run]], size: int = 2) -> list[list[Tensor]]:
    """Each rank's logits of each step."""
    table, turn = Table(size), threading.Lock()
    plan = model.plan()

    def run(rank: int) -> list[Tensor]:
        with turn:
            own = msgspec.structs.replace(plan, shard=Shard(rank, size))
            rules = DeviceRules(keeps_int8=True)
            decoder = load_model(own, torch.bfloat16, DEVICE, rules, TurnGroup(table, rank, turn))
            cache = make_cache(decoder.config, model.kv_dtype)
            kernels = TritonSteps(decoder.config, decoder.parameters, cache, max_length=LENGTH)
            return [logits_of(kernels, runs) for runs in steps]

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_ranks_say_what_one_says_in_float32(model: Model) -> None:
    steps = [runs_of(step) for step in (*STEPS[:2], STEPS[2][:1])]
    eager = model.eager()

    first, second = logits_of_ranks(model, steps)

    for runs, logits, others in zip(steps, first, second, strict=True):
        assert torch.equal(logits, others)
        assert error(logits, logits_of(eager, runs)) < MAX_ERROR


def test_the_bits_of_a_sequence_of_two_ranks_are_those_alone() -> None:
    model = MODELS["llama"]
    together = logits_of_ranks(model, [runs_of(step) for step in STEPS[:2]])[0]
    alone = logits_of_ranks(model, [runs_of(step)[:1] for step in STEPS[:2]])[0]

    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours[: len(theirs)], theirs)

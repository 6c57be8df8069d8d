"""Which code computes a model's steps, and what is said where it is not our kernels."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest
import torch

from brlite.backends.torch import choose_steps as module
from brlite.backends.torch.choose_steps import choose_steps, find_obstacle
from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import RULES
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parallel import SharedParameters
from brlite.backends.torch.parameters import allocate_parameters
from brlite.backends.torch.probe import PLAIN_CONFIG
from brlite.backends.torch.steps import EagerSteps, StepLimits, Steps
from brlite.config.options import TorchKernels
from brlite.errors import ConfigError
from brlite.models.config import KVDtype, ModelConfig


def make_model(
    config: ModelConfig = PLAIN_CONFIG, dtype: torch.dtype = torch.bfloat16, kv_dtype: KVDtype = "bfloat16"
) -> tuple[Decoder, KVCache]:
    parameters = allocate_parameters(config, dtype, torch.device("cpu"))
    cache = KVCache(config, num_blocks=2, block_size=4, dtype=kv_dtype, device=torch.device("cpu"))
    return Decoder(config, parameters, max_length=8), cache


def choose(kernels: TorchKernels, dtype: torch.dtype = torch.bfloat16) -> tuple[Steps, list[str]]:
    return choose_steps(*make_model(dtype=dtype), kernels, StepLimits(rows=2, tokens=4, length=8))


@pytest.fixture
def has_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of a card for which the kernels can be compiled."""
    monkeypatch.setattr(module, "compute_capability", lambda _: (8, 0))
    monkeypatch.setattr(module, "rules_for", lambda _: RULES["cuda"])


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_a_cpu_takes_the_operators_of_torch_and_there_is_nothing_to_say(kernels: TorchKernels) -> None:
    steps, notes = choose(kernels)

    assert isinstance(steps, EagerSteps)
    assert notes == []


def test_kernels_that_are_asked_for_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.torch_kernels is \"triton\", .* they are for CUDA cards"):
        choose("triton")


@pytest.mark.usefixtures("has_card")
def test_an_obstacle_is_told_of_or_refused() -> None:
    steps, notes = choose("auto", torch.float32)

    assert isinstance(steps, EagerSteps)
    assert len(notes) == 1
    assert "slower than this card can be" in notes[0]
    assert "engine.dtype" in notes[0]
    assert choose("eager", torch.float32)[1] == []
    with pytest.raises(ConfigError, match=r"our kernels cannot be used: they compute in bfloat16"):
        choose("triton", torch.float32)


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_a_card_may_be_too_old(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compute_capability", lambda _: capability)

    assert (
        find_obstacle(*make_model()) == f"the card's compute capability is {'.'.join(map(str, capability))}, below 8.0"
    )


@pytest.mark.usefixtures("has_card")
def test_a_cache_in_float32_is_an_obstacle() -> None:
    assert "engine.dtype" in (find_obstacle(*make_model(kv_dtype="float32")) or "")


@pytest.mark.usefixtures("has_card")
def test_heads_may_be_too_large() -> None:
    config = msgspec.structs.replace(PLAIN_CONFIG, head_dim=264)

    assert find_obstacle(*make_model(config)) == "head_dim is 264, above 256"


@pytest.mark.usefixtures("has_card")
def test_a_part_of_a_model_is_no_obstacle() -> None:
    decoder, cache = make_model()
    parameters = decoder.parameters
    group: Any = None  # which nobody calls
    decoder.parameters = SharedParameters(parameters.named, parameters.linears, group=group, tokens=range(9))

    assert find_obstacle(decoder, cache) is None


@pytest.mark.usefixtures("has_card")
def test_triton_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "brlite.backends.torch.triton.rows", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)

    assert "Triton cannot be used (import of triton halted" in (find_obstacle(*make_model()) or "")

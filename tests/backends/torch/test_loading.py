"""Checkpoints and specs that do not fit are refused in one line, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from brlite.backends.torch.backend import TorchBackend
from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.loading import MemoryNeeds, load_model
from brlite.checkpoint.stored_tensor import StoredTensor
from brlite.config.options import ModelSpec
from brlite.errors import ConfigError, ModelError
from tests.load_plans import make_plan
from tests.tiny_models import TINY_CONFIGS, VOCAB_SIZE, TensorCheckpoint, tiny_tensors

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


class UnreadableCheckpoint(TensorCheckpoint):
    """A checkpoint whose data must not be asked for."""

    def tensors(self) -> Iterator[StoredTensor]:
        raise AssertionError("data was read before the shapes were checked")


def load(checkpoint: TensorCheckpoint, dtype: torch.dtype = torch.float32, **spec: Any) -> Decoder:
    fitting = ModelSpec(**{"name": "tiny", "build_seq": 40, **spec})
    return load_model(make_plan(checkpoint, fitting), dtype, torch.device("cpu"))


def test_parts_of_a_fused_matrix_stand_in_the_order_of_the_reference() -> None:
    tensors = tiny_tensors("qwen2")

    qkv = load(TensorCheckpoint.tiny("qwen2")).parameters.linears["layers.1.qkv"]

    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert torch.equal(qkv.weight, torch.cat([tensors[f"{name}.weight"] for name in names]))
    assert qkv.bias is not None
    assert torch.equal(qkv.bias, torch.cat([tensors[f"{name}.bias"] for name in names]))


def test_weights_are_rounded_to_bfloat16_and_norms_are_not() -> None:
    tensors = tiny_tensors("llama")
    tensors = {name: tensor + 2**-12 for name, tensor in tensors.items()}

    parameters = load(TensorCheckpoint(TINY_CONFIGS["llama"], tensors)).parameters

    assert torch.equal(parameters.named["embedding"], tensors["model.embed_tokens.weight"].bfloat16().float())
    assert torch.equal(parameters.named["norm"], tensors["model.norm.weight"])


def test_rows_of_a_normalised_head_have_length_one_and_a_row_of_zeros_stays() -> None:
    tensors = tiny_tensors("baichuan")
    tensors["lm_head.weight"][7] = 0
    expected = torch.nn.functional.normalize(tensors["lm_head.weight"], dim=1)

    parameters = load(TensorCheckpoint(TINY_CONFIGS["baichuan"], tensors)).parameters

    assert torch.equal(parameters.linears["head"].weight, expected.bfloat16().float())
    assert not parameters.linears["head"].weight[7].any()
    assert torch.equal(parameters.named["embedding"], tensors["model.embed_tokens.weight"])


NEEDS = MemoryNeeds("cuda:0 (a card)", 16 * 10**9, 90 * 10**9, 79 * 10**9, 85 * 10**9)
BEYOND_ANY_ADDRESS = 2**60


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(BEYOND_ANY_ADDRESS, dtype=torch.uint8),
        lambda: torch.empty((2**40, 2**40)),
        lambda: np.empty(BEYOND_ANY_ADDRESS, np.uint8),
    ],
    ids=["torch", "torch, overflow", "numpy"],
)
def test_too_little_memory_is_one_line_with_the_breakdown(fail: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as refusal, NEEDS.explained("the KV cache", "lower num_blocks"):
        fail()

    assert str(refusal.value) == (
        "cuda:0 (a card) has too little memory for the KV cache: the weights take 16 GB, the KV cache 90 GB, and "
        "79 GB of 85 GB were free; lower num_blocks"
    )


def test_another_error_of_torch_is_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), NEEDS.explained("the weights", ""):
        torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_cache_that_does_not_fit_is_told_with_the_sizes_of_this_model() -> None:
    plan = make_plan(TensorCheckpoint.tiny(), ModelSpec(build_seq=8, num_blocks=10**12))

    with pytest.raises(ConfigError, match=r"^cpu .* for the KV cache: the weights take .* kB, the KV cache .* TB, and"):
        TorchBackend.load(plan)


def test_progress_grows_to_one() -> None:
    seen: list[float] = []

    plan = make_plan(
        TensorCheckpoint.tiny(), ModelSpec(build_seq=8), on_progress=lambda stage, fraction: seen.append(fraction)
    )

    load_model(plan, torch.bfloat16, torch.device("cpu"))

    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_tensors_that_carry_nothing_are_ignored() -> None:
    tensors = tiny_tensors("llama-tied")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["lm_head.weight"] = torch.zeros(VOCAB_SIZE, 64)

    decoder = load(TensorCheckpoint(TINY_CONFIGS["llama-tied"], tensors))

    assert decoder.parameters.linears["head"].weight is decoder.parameters.named["embedding"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({Q_PROJ: None}, [Q_PROJ, "missing"]),
        ({"lm_head.weight": None}, ["lm_head.weight", "missing"]),
        ({Q_PROJ: torch.zeros(64, 32)}, [Q_PROJ, "[64, 32]", "[64, 64]"]),
        ({"model.norm.weight": torch.zeros(1, 64)}, ["model.norm.weight", "[1, 64]", "[64]"]),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(1)}, ["model.layers.3.mlp.up_proj.weight", "not expected"]),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, ["q_proj.bias", "not expected", "llama"]),
    ],
)
def test_tensor_that_does_not_fit_is_named_before_data_is_read(
    change: dict[str, torch.Tensor | None], words: list[str]
) -> None:
    tensors = {**tiny_tensors("llama"), **change}
    checkpoint = UnreadableCheckpoint(
        TINY_CONFIGS["llama"], {name: tensor for name, tensor in tensors.items() if tensor is not None}
    )

    with pytest.raises(ModelError) as refusal:
        load(checkpoint)

    assert all(word in str(refusal.value) for word in ["tiny: ", *words])
    assert "\n" not in str(refusal.value)


def test_many_missing_tensors_are_counted_not_listed() -> None:
    tensors = {name: tensor for name, tensor in tiny_tensors("llama").items() if "layers" not in name}

    with pytest.raises(ModelError, match="and 24 more are missing"):
        load(UnreadableCheckpoint(TINY_CONFIGS["llama"], tensors))


@pytest.mark.parametrize(
    ("spec", "words"),
    [({"build_seq": 129}, ["build_seq", "129", "128"]), ({"vocab_size": 299}, ["vocab_size", "299", "300"])],
)
def test_spec_that_the_model_cannot_keep_is_refused(spec: dict[str, int], words: list[str]) -> None:
    checkpoint = UnreadableCheckpoint(TINY_CONFIGS["llama"], tiny_tensors("llama"))

    with pytest.raises(ConfigError) as refusal:
        load(checkpoint, **spec)

    assert all(word in str(refusal.value) for word in words)

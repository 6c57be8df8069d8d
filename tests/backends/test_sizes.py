"""The context that a model has where the config leaves it to us, and the cache that comes with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from brlite.backends import sizes
from brlite.backends.sizes import DEFAULT_MODEL_CONFIG, DEFAULT_MODEL_FORMATS, GIB, Sizes, describe_model, measure
from brlite.backends.torch.device import RULES, CardMemory
from brlite.config.options import Config, DraftConfig, EngineConfig, ModelSpec
from brlite.llm import LLM
from brlite.process.machine import Memory
from brlite.sampling_params import SamplingParams
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

GIGANTIC = Memory(2**50, 2**50)


@pytest.fixture(autouse=True)
def a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`memory_gib` decides in these tests, not the machine that they run on."""
    monkeypatch.setattr(sizes, "find_memory", lambda: GIGANTIC)


def measured(memory_gib: float, **spec: Any) -> Sizes:
    return measure_config(DEFAULT_MODEL_CONFIG, ModelSpec(**spec), EngineConfig(memory_gib=memory_gib))


def measure_config(config: Mapping[str, Any], spec: ModelSpec, engine: EngineConfig) -> Sizes:
    return measure(describe_model(config, spec), spec, engine)


def test_the_context_is_the_models_own_and_the_cache_no_larger_than_for_short_ones() -> None:
    found = measured(0.0)

    assert (found.context, found.context_reason) == (8192, "the model's own")
    assert found.num_blocks * found.block_size == 16 * 2048


def test_a_context_longer_than_the_shared_cache_has_room_for_one() -> None:
    found = measured(0.0, build_batch=2)

    assert (found.context, found.num_blocks * found.block_size) == (8192, 8192)


@pytest.mark.parametrize("memory_gib", [0.4, 0.5, 0.7, 0.9])
def test_context_and_cache_take_half_of_what_the_weights_leave(memory_gib: float) -> None:
    found = measured(memory_gib)

    left = memory_gib * GIB - found.weight_bytes
    assert found.kv_bytes <= left / 2
    assert 2048 <= found.context <= found.num_blocks * found.block_size
    if found.context < 8192:
        assert found.context_reason == "of the model's 8192, limited by engine.memory_gib"
        assert found.kv_bytes > left / 2 - 2 * found.block_size * found.kv_bytes_per_token


def test_memory_of_the_machine_limits_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "find_memory", lambda: Memory(GIB // 2, GIB // 4))

    assert measured(0.0).context_reason == "of the model's 8192, limited by memory"


def test_with_a_build_seq_each_sequence_has_a_whole_context() -> None:
    found = measured(0.1, build_seq=1024, build_batch=4)

    assert (found.context, found.num_blocks * found.block_size) == (1024, 4096)


def test_num_blocks_alone_limits_the_context() -> None:
    found = measured(0.0, num_blocks=200)

    assert (found.context, found.num_blocks) == (3200, 200)
    assert found.context_reason == "of the model's 8192, limited by num_blocks"


CARD = CardMemory(total=80 * GIB, free=70 * GIB)
LLAMA_8B = {
    **DEFAULT_MODEL_CONFIG,
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> dict[int, CardMemory]:
    """The CPU in the place of CUDA cards with this memory."""
    memory = {0: CARD, 1: CARD}
    monkeypatch.setattr(sizes, "select_device", lambda name, index=0: SimpleNamespace(type="cuda", index=index))
    monkeypatch.setattr(sizes, "device_memory", lambda device: memory[device.index])
    monkeypatch.setattr(sizes, "compute_dtype", lambda *_: SimpleNamespace(itemsize=2))
    monkeypatch.setattr(sizes, "rules_for", lambda _: RULES["cuda"])
    return memory


def on_card(engine: dict[str, Any] | None = None, **spec: Any) -> Sizes:
    return measure_config(LLAMA_8B, ModelSpec(**spec), EngineConfig(backend="torch", **(engine or {})))


@pytest.mark.usefixtures("cards")
def test_weights_graphs_and_the_cache_fill_the_share_of_a_card() -> None:
    found, eager = on_card(build_batch=64), on_card({"torch_kernels": "eager"}, build_batch=64)

    share = 0.9 * CARD.total - (CARD.total - CARD.free)
    for each in (found, eager):
        assert share - each.block_size * each.kv_bytes_per_token < each.num_bytes <= share
    assert eager.graph_bytes == 0
    assert 0.1 * GIB < found.graph_bytes < GIB
    assert found.num_blocks < eager.num_blocks
    assert found.free_bytes == CARD.free


def test_the_memory_is_that_of_the_models_card(cards: dict[int, CardMemory]) -> None:
    cards[0] = CARD._replace(free=0)

    assert on_card(devices=(1,)).kv_bytes > 40 * GIB
    assert "limited by engine.gpu_memory_utilization" in on_card(devices=(0,)).context_reason


def test_of_ranks_the_fullest_card_decides(cards: dict[int, CardMemory]) -> None:
    cards[1] = CARD._replace(free=20 * GIB)

    found = on_card(tensor_parallel=2)

    assert found.graph_bytes == 0  # ranks have none
    assert found.num_bytes <= 2 * (0.9 * CARD.total - (CARD.total - 20 * GIB))


@pytest.mark.usefixtures("cards")
def test_the_cache_on_a_card_leaves_room_for_the_draft_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "served")
    draft = write_tiny_model(tmp_path / "draft")
    spec = ModelSpec(name="m", path=str(folder), draft=DraftConfig(path=str(draft)))

    found = sizes.sizes_at(folder, spec, EngineConfig(backend="torch"))

    assert found.draft is not None
    assert found.draft.num_bytes > 2**20
    assert found.num_bytes <= 0.9 * CARD.total - (CARD.total - CARD.free)


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize(
    ("kernels", "tensor_parallel", "expected"),
    [("auto", 1, (True, True)), ("eager", 1, (False, True)), ("auto", 2, (True, False))],
)
def test_what_a_card_does_with_drafts_is_known_before_a_model_is_loaded(
    kernels: str, tensor_parallel: int, expected: tuple[bool, bool]
) -> None:
    found = on_card({"torch_kernels": kernels}, tensor_parallel=tensor_parallel)

    assert (found.verifies_drafts, found.runs_ahead) == expected


def test_the_quantized_tensors_of_an_embedding_model_are_found_without_their_prefix() -> None:
    spec, engine = ModelSpec(), EngineConfig()
    bare = {name.removeprefix("model."): each for name, each in DEFAULT_MODEL_FORMATS.items()}

    found, expected = (
        measure(describe_model(DEFAULT_MODEL_CONFIG, spec, formats), spec, engine)
        for formats in (bare, DEFAULT_MODEL_FORMATS)
    )

    assert (found.weight_bytes, found.dtype) == (expected.weight_bytes, expected.dtype)


def test_an_endless_context_is_asked_for_by_name() -> None:
    config = {**DEFAULT_MODEL_CONFIG, "max_position_embeddings": 10**6}

    found = measure_config(config, ModelSpec(), EngineConfig())

    assert found.context == 131_072
    assert "build_seq or --context may ask for more" in found.context_reason


def test_the_start_says_what_the_context_is_and_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "brlite.backends.sizes")
    folder = write_tiny_model(tmp_path / "tiny")
    write_byte_tokenizer(folder)
    spec = ModelSpec(name="tiny", path=str(folder), build_batch=2)

    with LLM(config=Config(model=(spec,))) as llm:
        (output,) = llm.generate("x" * 100, SamplingParams(max_tokens=20, ignore_eos=True))

    assert len(output.outputs[0].token_ids) == 20
    assert "model tiny: a context of 128 tokens, the model's own; KV cache: " in caplog.text
    assert "4096 tokens in all for at most 2 sequences" in caplog.text

"""The context that a model has where the config leaves it to us, and the cache that comes with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from brlite.backends import sizes
from brlite.backends.sizes import DEFAULT_MODEL_CONFIG, GIB, Sizes, measure
from brlite.config.options import Config, EngineConfig, ModelSpec
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
    return measure(DEFAULT_MODEL_CONFIG, ModelSpec(**spec), EngineConfig(memory_gib=memory_gib))


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


def test_an_endless_context_is_asked_for_by_name() -> None:
    config = {**DEFAULT_MODEL_CONFIG, "max_position_embeddings": 10**6}

    found = measure(config, ModelSpec(), EngineConfig())

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

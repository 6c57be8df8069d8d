"""Embeddings offline and in an event loop, of a small model from real files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brlite import LLM, AsyncEngine, Config, PoolingParams, SamplingParams
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import InvalidRequest
from brlite.sampling_params import Pooling

pytestmark = pytest.mark.torch

TEXTS = ["The first prompt", "a second", "The first prompt, and more of it", "x", "The first pr"]


def make_config(tiny_folder: Path, **engine: Any) -> Config:
    spec = ModelSpec(name="tiny", path=str(tiny_folder), build_seq=128, build_batch=4)
    return Config(model=(spec,), engine=EngineConfig(**{"device": "cpu", **engine}))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_transformers_hidden_states_pooled(tiny_folder: Path, pooling: Pooling) -> None:
    import torch
    from transformers import AutoModel

    with LLM(config=make_config(tiny_folder, dtype="float32", max_num_batched_tokens=7)) as llm:
        outputs = llm.embed(TEXTS, PoolingParams(pooling=pooling))
        token_ids = [llm.tokenizer.encode(text) for text in TEXTS]

    model = AutoModel.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = [model(torch.tensor([ids])).last_hidden_state[0].double() for ids in token_ids]
    vectors = [state[-1] if pooling == "last" else state.mean(dim=0) for state in states]
    for output, vector in zip(outputs, vectors, strict=True):
        assert output.embedding is not None
        assert np.abs(np.asarray(output.embedding) - (vector / vector.norm()).numpy()).max() < 1e-4


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_batch_gives_the_bits_of_each_text_alone_on_native_code(tiny_folder: Path, pooling: Pooling) -> None:
    params = PoolingParams(pooling=pooling)
    with LLM(config=make_config(tiny_folder, backend="native")) as llm:
        together = llm.embed([*TEXTS, [5, 6, 7]], params)
        completed = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=4))
        alone = [llm.embed(text, params)[0] for text in TEXTS]
    with LLM(config=make_config(tiny_folder, backend="native", max_num_batched_tokens=4, prefix_caching=False)) as llm:
        in_chunks = llm.embed(TEXTS, params)
        assert [output.outputs[0].text for output in completed] == [
            output.outputs[0].text for output in llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=4))
        ]

    assert [output.embedding for output in together[:-1]] == [output.embedding for output in alone]
    assert [output.embedding for output in together[:-1]] == [output.embedding for output in in_chunks]
    assert together[-1].prompt_token_ids == [5, 6, 7]


def test_a_wrong_prompt_is_named_before_anything_runs(tiny_folder: Path) -> None:
    with LLM(config=make_config(tiny_folder)) as llm:
        with pytest.raises(InvalidRequest, match=r"prompts\[1\]: .*at least one token"):
            llm.embed(["good", ""])
        with pytest.raises(InvalidRequest, match=r"prompts\[0\]: dimensions must be 64 for this model, got 8"):
            llm.embed("good", PoolingParams(dimensions=8))
        assert len(llm.embed([])) == 0


async def test_an_engine_in_a_loop_embeds_beside_a_stream(tiny_folder: Path) -> None:
    async with AsyncEngine.from_config(make_config(tiny_folder)) as engine:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        alone = await _text(engine, params)
        streamed, embedded = await asyncio.gather(
            _text(engine, params), engine.embed(TEXTS * 20, PoolingParams(pooling="mean"))
        )

    assert streamed == alone
    assert [output.embedding for output in embedded[:5]] == [output.embedding for output in embedded[95:]]


async def _text(engine: AsyncEngine, params: SamplingParams) -> str:
    return "".join([output.outputs[0].text async for output in engine.generate("once", params)])

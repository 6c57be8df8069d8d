"""Embeddings of engines that give hidden states: the toy's, in whatever calls the engine allows."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from brlite import LLM, Config, PoolingParams
from brlite.backends.plugins.slot_backend import SlotBackend
from brlite.backends.plugins.toy import ToyEngine, token_state
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import EngineError, InvalidRequest
from brlite.sampling_params import Pooling
from tests.backends.plugins.toys import StiffToy

SPEC = ModelSpec(name="toy", build_seq=64, build_batch=2)
TEXTS = ["The sea is", "x", "a longer text than the others"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("budget", [5, 128])
def test_the_toy_gives_embeddings_beside_its_texts(pooling: Pooling, budget: int) -> None:
    config = Config(model=(SPEC,), engine=EngineConfig(name="toy", max_num_batched_tokens=budget))
    with LLM(config=config) as llm:
        outputs = llm.embed(TEXTS, PoolingParams(pooling=pooling, normalize=False))
        said = llm.generate("ab")[0].outputs[0].text

    assert said == "ab"
    for output in outputs:
        ids = np.array(output.prompt_token_ids, np.int32)
        states = np.stack([token_state(ids[: length + 1]) for length in range(len(ids))]).astype(np.float64)
        expected = states[-1] if pooling == "last" else states.mean(axis=0)
        assert np.allclose(np.asarray(output.embedding), expected, rtol=1e-6, atol=1e-7)


def test_an_engine_that_takes_prompts_whole_has_no_embeddings() -> None:
    with closing(SlotBackend(StiffToy(), SPEC, EngineConfig(name="toy"))) as backend:
        assert backend.info.hidden_size == 0


def test_a_hidden_size_without_hidden_states_does_not_open() -> None:
    class OnlySays(ToyEngine):
        hidden_states = None  # type: ignore[assignment]

    with pytest.raises(EngineError, match="has a hidden_size, and no hidden_states"):
        SlotBackend(OnlySays(), SPEC, EngineConfig(name="toy"))


def test_hidden_states_of_another_form_end_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brlite.backends.plugins.toy.ToyEngine.hidden_states", lambda self, slots: np.zeros((1, 3)))
    with LLM(config=Config(model=(SPEC,), engine=EngineConfig(name="toy"))) as llm:
        with pytest.raises(EngineError):
            llm.embed("x")

        assert llm.generate("ab")[0].outputs[0].text == "ab"


def test_dimensions_are_the_toys() -> None:
    with (
        LLM(config=Config(model=(SPEC,), engine=EngineConfig(name="toy"))) as llm,
        pytest.raises(InvalidRequest, match="dimensions must be 8"),
    ):
        llm.embed("x", PoolingParams(dimensions=2))

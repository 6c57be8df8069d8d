"""brlite's own backends keep the contract, and behind it a model says what it says without."""

from __future__ import annotations

from pathlib import Path

import pytest

from brlite.backends.plugins.builtin import BuiltinEngine
from brlite.backends.plugins.conformance.checks import run_checks
from brlite.backends.plugins.conformance.engine_under_test import EngineUnderTest
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.llm import LLM
from brlite.sampling_params import SamplingParams

BACKENDS = [{"backend": "native"}, {"backend": "torch", "dtype": "float32"}]


def make_spec(tiny_folder: Path) -> ModelSpec:
    return ModelSpec(name="tiny", path=str(tiny_folder), build_seq=80, build_batch=3)


@pytest.mark.parametrize("backend", BACKENDS, ids=["native", "torch"])
@pytest.mark.parametrize("budget", [8, 128])
def test_both_keep_the_contract(
    tiny_folder: Path, native_library: object, backend: dict[str, str], budget: int
) -> None:
    config = EngineConfig(device="cpu", threads=1, max_num_batched_tokens=budget, **backend)
    subject = EngineUnderTest(BuiltinEngine, make_spec(tiny_folder), config)
    try:
        outcomes = run_checks(subject, lambda outcome: None)
    finally:
        subject.close()

    assert [(outcome.name, outcome.result) for outcome in outcomes if outcome.result != "passed"] == [
        ("hidden states are those of the last token", "not tried")  # which are not claimed
    ]
    assert subject.capabilities.is_batch_invariant == (backend["backend"] == "native")


@pytest.mark.parametrize("backend", BACKENDS, ids=["native", "torch"])
def test_a_text_is_the_same_with_the_contract_in_between(
    tiny_folder: Path, native_library: object, backend: dict[str, str]
) -> None:
    prompts = ["The first prompt", "a second", "x", "The first prompt and more"]
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1),
        SamplingParams(seed=1, max_tokens=12, ignore_eos=True, repetition_penalty=1.3, n=2),
        SamplingParams(seed=2, temperature=1.5, top_p=0.9, max_tokens=12, ignore_eos=True),
        SamplingParams(seed=3, temperature=1.5, top_k=20, min_tokens=5, max_tokens=12),
    ]
    texts = []
    for name in (None, "brlite"):
        engine = EngineConfig(name=name, device="cpu", threads=1, **backend)
        with LLM(config=Config(engine=engine, model=(make_spec(tiny_folder),))) as llm:
            outputs = llm.generate(prompts, params)
        texts.append([[completion.token_ids for completion in output.outputs] for output in outputs])

    assert texts[0] == texts[1]

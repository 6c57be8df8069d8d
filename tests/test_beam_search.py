"""Beam search on a real model, beside transformers' own; and through the HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.llm import LLM
from brlite.sampling_params import SamplingParams

pytestmark = pytest.mark.torch

PROMPTS = [[84, 104, 101, 32], list(range(30, 70))]
MAX_TOKENS = 10
CASES: dict[str, dict[str, Any]] = {
    "length penalty 1": {"best_of": 4, "length_penalty": 1.0, "early_stopping": False},
    "favours long answers": {"best_of": 3, "length_penalty": 2.5, "early_stopping": "never"},
    "favours short answers": {"best_of": 4, "length_penalty": -1.0, "early_stopping": False},
    "stops early": {"best_of": 4, "length_penalty": 1.0, "early_stopping": True},
}


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Any:
    spec = ModelSpec(name="tiny", path=str(tiny_folder), build_seq=128, build_batch=8)
    with LLM(config=Config(model=(spec,), engine=EngineConfig(dtype="float32", device="cpu"))) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def end_token_ids(llm: LLM) -> list[int]:
    """Tokens that the model, whose weights are random, often draws: with these as ends answers differ in length."""
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True))
    return sorted({output.outputs[0].token_ids[at] for output in outputs for at in (3, 7)})


def cut_behind_end(token_ids: list[int], ends: list[int]) -> list[int]:
    """An answer without what pads it: transformers counts no end among its first two tokens."""
    length = next((at + 1 for at, token_id in enumerate(token_ids) if at >= 2 and token_id in ends), len(token_ids))
    return token_ids[:length]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_are_those_of_transformers(llm: LLM, reference: Any, case: dict[str, Any]) -> None:
    ends = end_token_ids(llm)
    params = SamplingParams(
        use_beam_search=True,
        temperature=0,
        n=2,
        max_tokens=MAX_TOKENS,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=tuple(ends),
        **case,
    )

    outputs = llm.generate(PROMPTS, params)

    lengths = set()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=case["best_of"],
            num_return_sequences=2,
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
            max_new_tokens=MAX_TOKENS,
            min_new_tokens=2,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )
        found = [completion.token_ids for completion in output.outputs]
        assert found == [cut_behind_end(row[len(prompt) :].tolist(), ends) for row in expected]
        lengths.update(map(len, found))
    assert len(lengths) > 1 or case["length_penalty"] > 1


def test_models_own_sampling_is_not_for_a_beam_search(llm: LLM) -> None:
    params = llm.get_default_sampling_params(use_beam_search=True, temperature=0, n=2, max_tokens=4)

    (output,) = llm.generate("a prompt", params)

    assert [len(completion.token_ids) for completion in output.outputs] == [4, 4]

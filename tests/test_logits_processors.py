"""Logits processors on every kind of engine, with real backends: offline, embedded and over ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brlite.errors import InvalidRequest
from brlite.llm import LLM, AsyncEngine
from brlite.sampling_params import SamplingParams, StructuredOutput
from tests.test_structured_output import config
from tests.tiny_models import VOCAB_SIZE

Logits = Any
ENGINES: dict[str, dict[str, Any]] = {
    "native": {"backend": "native"},
    "torch": {"backend": "torch", "dtype": "float32"},
    "toy": {"name": "toy"},
}
DRAWN: dict[str, Any] = {"temperature": 1, "max_tokens": 12, "ignore_eos": True, "seed": 7}


def only(llm: LLM | AsyncEngine, text: str) -> Callable[[list[int], Logits], Logits]:
    """Spells the text, over and over, in new logits."""
    token_ids = llm.tokenizer.encode_continuation(text)

    def process(output: list[int], logits: Logits) -> Logits:
        found = np.full_like(logits, -np.inf)
        found[token_ids[len(output) % len(token_ids)]] = 0
        return found

    return process


def unchanged(prompt: tuple[int, ...], output: list[int], logits: Logits) -> Logits:
    return logits


def raises(output: list[int], logits: Logits) -> Logits:
    raise ValueError("secret")


FAULTS: list[tuple[Callable[[list[int], Logits], Any], str]] = [
    (raises, "raises failed: ValueError"),
    (lambda output, logits: None, "returned NoneType; wanted is a numpy array, float32"),
    (lambda output, logits: logits[:-1], "wanted is a numpy array, float32"),
    (lambda output, logits: logits.astype(np.float64), "returned float64"),
    (lambda output, logits: logits - np.inf, "excluded every token"),
    (lambda output, logits: logits * np.float32("nan"), "returned logits with NaN or infinity"),
    (lambda output, logits: logits + np.inf, "returned logits with NaN or infinity"),
    (lambda output: output, "failed: TypeError"),  # type: ignore[misc]
]


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_each_engine_draws_from_the_new_logits_and_leaves_the_rest_of_the_batch_as_it_is(
    tiny_folder: Path, engine: dict[str, Any]
):
    free = SamplingParams(**DRAWN, repetition_penalty=1.2)
    same = SamplingParams(**DRAWN, repetition_penalty=1.2, logits_processors=[unchanged])
    faulty = [SamplingParams(**DRAWN, logits_processors=[process]) for process, _ in FAULTS]

    with LLM(config=config(tiny_folder, engine, build_batch=8)) as llm:
        spelled = SamplingParams(**DRAWN, n=2, logits_processors=[unchanged, only(llm, "sea ")])
        alone = llm.generate("hello", free)[0].outputs[0]
        first, again, both, *ended = llm.generate(["hello"] * (3 + len(faulty)), [free, same, spelled, *faulty])

    assert first.outputs[0].token_ids == again.outputs[0].token_ids == alone.token_ids
    assert [output.text for output in both.outputs] == ["sea sea sea "] * 2
    for output, (_, reason) in zip(ended, FAULTS, strict=True):
        assert output.outputs[0].finish_reason == "error"
        assert reason in str(output.outputs[0].stop_reason)
        assert "secret" not in str(output.outputs[0].stop_reason)


def test_others_have_the_same_bits_as_alone_and_logprobs_are_the_models_own(tiny_folder: Path):
    free = SamplingParams(**DRAWN, logprobs=3)
    unedited = SamplingParams(**{**DRAWN, "max_tokens": 1}, logprobs=3, prompt_logprobs=0)

    with LLM(config=config(tiny_folder, ENGINES["native"])) as llm:
        edited = SamplingParams(**DRAWN, logprobs=3, logits_processors=[only(llm, "x")])
        alone = llm.generate("hello", free)[0].outputs[0]
        spelled, mate = llm.generate(["hello", "hello"], [edited, free])
        follows = llm.generate("hello" + "x" * 12, unedited)[0]

    assert mate.outputs[0].logprobs == alone.logprobs
    assert spelled.outputs[0].text == "x" * 12
    reported = [entry.logprob for entry in spelled.outputs[0].logprobs or ()]
    computed = [entry.logprob for entry in (follows.prompt_logprobs or ())[5:] if entry is not None]
    assert reported == computed
    assert (spelled.outputs[0].logprobs or ())[0].top == (alone.logprobs or ())[0].top


@pytest.mark.torch
def test_two_ranks_call_it_once_and_answer_as_one_process_does(tiny_folder: Path):
    answers, calls = [], list[list[int]]()

    def count(output: list[int], logits: Logits) -> Logits:
        calls[-1].append(len(output))
        logits[: VOCAB_SIZE // 2] -= 1
        return logits

    params = [SamplingParams(**DRAWN, logits_processors=[count]), SamplingParams(**DRAWN)]
    for ranks in (1, 2):
        calls.append([])
        with LLM(config=config(tiny_folder, ENGINES["native"], tensor_parallel=ranks)) as llm:
            answers.append([output.outputs[0].token_ids for output in llm.generate(["one", "two"], params)])

    assert answers[0] == answers[1]
    assert calls == [list(range(12))] * 2


@pytest.mark.parametrize("engine", ["native", "toy"])
def test_an_array_that_a_processor_keeps_is_not_changed(tiny_folder: Path, engine: str):
    kept = np.zeros(VOCAB_SIZE if engine == "native" else 260, np.float32)[::-1]  # not contiguous either
    params = SamplingParams(
        **DRAWN, logit_bias={5: -100}, min_tokens=3, logits_processors=[lambda output, logits: kept]
    )

    with LLM(config=config(tiny_folder, ENGINES[engine])) as llm:
        assert llm.generate("hello", params)[0].outputs[0].finish_reason == "length"

    assert not kept.any()


def test_a_grammar_and_a_processor_restrict_one_draw(tiny_folder: Path):
    wish = StructuredOutput(choice=["left", "right"])
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "structured": wish}

    with LLM(config=config(tiny_folder, ENGINES["native"])) as llm:
        (letter,) = llm.tokenizer.encode_continuation("r")

        def prefer(output: list[int], logits: Logits) -> Logits:
            logits[letter] += 100
            return logits

        prefers_r = SamplingParams(**greedy, logits_processors=[prefer])
        excludes = SamplingParams(**greedy, logits_processors=[only(llm, "x")])
        right, ended = llm.generate(["a", "b"], [prefers_r, excludes])

    assert right.outputs[0].text == "right"
    assert ended.outputs[0].finish_reason == "error"
    assert "no token may be drawn" in str(ended.outputs[0].stop_reason)


async def test_an_embedded_engine_streams_beside_free_answers(tiny_folder: Path):
    async with AsyncEngine.from_config(config(tiny_folder, ENGINES["toy"])) as engine:

        async def read(params: SamplingParams) -> str:
            return "".join([output.outputs[0].text async for output in engine.generate("prompt", params)])

        free = SamplingParams(temperature=0, max_tokens=6)
        edited = SamplingParams(temperature=0, max_tokens=6, logits_processors=[only(engine, "abc")])
        texts = await asyncio.gather(read(free), read(edited), read(free))

    assert texts == ["prompt", "abcabc", "prompt"]


def test_a_name_that_the_config_lacks_is_refused_before_anything_runs(tiny_folder: Path):
    with LLM(config=config(tiny_folder, ENGINES["toy"])) as llm, pytest.raises(InvalidRequest, match="it allows no "):
        llm.generate("hello", SamplingParams(logits_processors=["no_such"]))

"""Structured output on every kind of engine, with real backends: offline, embedded, over ranks, with drafts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from brlite.config.options import Config, EngineConfig, GrammarConfig, ModelSpec
from brlite.errors import InvalidRequest
from brlite.llm import LLM, AsyncEngine
from brlite.llm.serving import SMALL_VOCABULARY
from brlite.sampling_params import SamplingParams, StructuredOutput
from tests.tiny_models import TINY_CONFIGS, VOCAB_SIZE, write_byte_tokenizer, write_model

SCHEMA = {
    "type": "object",
    "properties": {
        "identifier": {"type": "string", "pattern": "^[a-f]{2,5}$"},
        "is_active": {"type": "boolean"},
        "level": {"enum": ["low", "medium", "high"]},
    },
    "required": ["identifier", "is_active", "level"],
    "additionalProperties": False,
}
WISH = StructuredOutput(json_schema=SCHEMA)
PROMPTS = ["first", "a second one", "third"]
PARAMS = [
    SamplingParams(structured=WISH, temperature=0, max_tokens=64, logprobs=1),
    SamplingParams(structured=WISH, temperature=1.5, seed=5, max_tokens=64, n=2, repetition_penalty=1.3),
    SamplingParams(temperature=1, seed=2, max_tokens=40, ignore_eos=True),
]
ENGINES: dict[str, dict[str, Any]] = {
    "native": {"backend": "native"},
    "native without drafts": {"backend": "native", "speculation": "off"},
    "native, small steps": {"backend": "native", "max_num_batched_tokens": 8, "max_draft_tokens": 3},
    "torch": {"backend": "torch", "dtype": "float32"},
    "toy": {"name": "toy"},
}


def config(tiny_folder: Path, engine: dict[str, Any], **model: Any) -> Config:
    spec = ModelSpec(**{"name": "tiny", "path": str(tiny_folder), "build_seq": 128, "build_batch": 4, **model})
    return Config(model=(spec,), engine=EngineConfig(device="cpu", **engine))


def check(text: str) -> None:
    answer = json.loads(text)
    assert list(answer) == ["identifier", "is_active", "level"]
    assert set(answer["identifier"]) <= set("abcdef")
    assert answer["level"] in ("low", "medium", "high")


def answers(tiny_folder: Path, engine: dict[str, Any], **model: Any) -> list[list[str]]:
    with LLM(config=config(tiny_folder, engine, **model)) as llm:
        return [[each.text for each in output.outputs] for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_each_engine_obeys_the_schema(tiny_folder: Path, engine: dict[str, Any]):
    first, second, free = answers(tiny_folder, engine)

    for text in (*first, *second):
        check(text)
    assert len(second) == 2
    assert len(free[0]) > 0


@pytest.mark.torch
def test_drafts_and_small_steps_change_no_answer(tiny_folder: Path):
    expected = answers(tiny_folder, ENGINES["native without drafts"])

    assert answers(tiny_folder, ENGINES["native"]) == expected
    assert answers(tiny_folder, ENGINES["native, small steps"]) == expected


@pytest.mark.torch
def test_two_ranks_obey_the_schema_as_one_process_does(tiny_folder: Path):
    assert answers(tiny_folder, ENGINES["native"], tensor_parallel=2) == answers(tiny_folder, ENGINES["native"])


@pytest.mark.torch
def test_forced_tokens_are_verified_as_drafts(tiny_folder: Path):
    with LLM(config=config(tiny_folder, ENGINES["native"])) as llm:
        output = llm.generate(PROMPTS[0], PARAMS[0])[0].outputs[0]
        stats = llm._engine.stats

        assert stats.accepted_tokens == stats.draft_tokens > len(output.token_ids) / 2
        assert [entry.token_id for entry in output.logprobs or ()] == output.token_ids


def test_the_plug_in_engine_says_what_is_wrong_before_anything_runs(tiny_folder: Path):
    wrong = SamplingParams(structured=StructuredOutput(json_schema={"type": "array", "uniqueItems": True}))

    refusal = pytest.raises(InvalidRequest, match=r"prompts\[1\]: structured: at #/uniqueItems")
    with LLM(config=config(tiny_folder, ENGINES["toy"])) as llm, refusal as caught:
        llm.generate(PROMPTS[:2], [PARAMS[0], wrong])

    assert caught.value.param == "structured"


def test_tokens_that_meet_none_of_the_grammar_end_their_answer_alone(tiny_folder: Path):
    cut = SamplingParams(structured=WISH, temperature=0, max_tokens=64, allowed_token_ids=[*b'{"identf'])
    never = SamplingParams(structured=WISH, max_tokens=64, allowed_token_ids=[*b"xyz"])

    with LLM(config=config(tiny_folder, ENGINES["toy"])) as llm:
        first, second = llm.generate(PROMPTS[:2], [cut, PARAMS[0]])
        with pytest.raises(InvalidRequest, match="may begin with") as caught:
            llm.generate(PROMPTS[0], never)

    assert first.outputs[0].finish_reason == "error"
    assert "no token may be drawn" in str(first.outputs[0].stop_reason)
    assert first.outputs[0].text.startswith('{"ident')
    check(second.outputs[0].text)
    assert caught.value.param == "allowed_token_ids"


@pytest.mark.parametrize(("num_words", "preload"), [(0, True), (SMALL_VOCABULARY, True), (SMALL_VOCABULARY, False)])
async def test_a_large_vocabulary_is_read_when_a_server_loads_the_model(tmp_path: Path, num_words: int, preload: bool):
    write_model(tmp_path, {**TINY_CONFIGS["llama"], "vocab_size": VOCAB_SIZE + num_words})
    write_byte_tokenizer(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"word{index}": len(vocabulary) + index for index in range(num_words)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = msgspec.structs.replace(config(tmp_path, ENGINES["native"]), grammar=GrammarConfig(preload=preload))

    async with AsyncEngine.from_config(settings) as engine:
        assert (engine._engine.compiler._library is not None) == (preload and num_words > 0)


async def test_an_embedded_engine_streams_structured_and_free_answers_side_by_side(tiny_folder: Path):
    async with AsyncEngine.from_config(config(tiny_folder, ENGINES["toy"])) as engine:

        async def read(prompt: str, params: SamplingParams) -> str:
            return "".join([output.outputs[0].text async for output in engine.generate(prompt, params)])

        texts = await asyncio.gather(
            *(read(f"prompt {number}", PARAMS[number % 2 * 2]) for number in range(8)),
            read("choose", SamplingParams(structured=StructuredOutput(choice=["left", "right"]))),
        )
        with pytest.raises(InvalidRequest, match="look-around"):
            await read("no", SamplingParams(structured=StructuredOutput(regex="(?=a)")))

    for text in texts[0:8:2]:
        check(text)
    assert texts[-1] in ("left", "right")

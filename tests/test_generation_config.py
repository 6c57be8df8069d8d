"""The sampling values that a model's files recommend: read, checked, and used where a request has none of its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from brlite.checkpoint.generation_config import read_recommended_sampling
from brlite.config.options import Config, ModelSpec
from brlite.errors import ModelError
from brlite.llm import LLM, AsyncEngine, build_engine
from brlite.sampling_params import SamplingParams
from tests.fakes import reference_tokens
from tests.server.conftest import Client, MakeClient, chat_body, completion_body, make_client  # noqa: F401  # a fixture
from tests.test_structured_output import ENGINES, config
from tests.tiny_models import write_byte_tokenizer, write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = write_tiny_model(tmp_path / "tiny")
    write_byte_tokenizer(path)
    return path


def write_generation_config(folder: Path, **values: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_only_sampling_values_are_read_and_null_is_none(folder: Path) -> None:
    assert read_recommended_sampling(folder) == {}

    write_generation_config(folder, temperature=0.6, top_k=None, do_sample=True, eos_token_id=2, max_new_tokens=9)

    assert read_recommended_sampling(folder) == {"temperature": 0.6}


def test_a_broken_file_is_a_fault_of_the_model(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    stages: list[str] = []

    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read_recommended_sampling(folder)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        build_engine(config(folder, {}), on_progress=lambda stage, fraction: stages.append(stage))

    assert stages == []  # it is found before minutes of reading weights


@pytest.mark.torch
def test_offline_they_hold_where_no_parameters_are_given(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "brlite.llm")
    write_generation_config(folder, temperature=0.0, top_k=10**6, top_p=5, repetition_penalty=1.25)

    with LLM(config=config(folder, ENGINES["torch"])) as llm:
        defaults = llm.get_default_sampling_params(max_tokens=12)
        outputs = [llm.generate("x", each)[0].outputs[0].token_ids for each in (None, None, SamplingParams(seed=1))]

    assert defaults == SamplingParams(temperature=0, top_k=-1, repetition_penalty=1.25, max_tokens=12)
    assert outputs[0] == outputs[1] != outputs[2]
    assert "sampling defaults of its generation config: temperature 0, top_k -1, repetition_penalty 1.25" in caplog.text
    assert "top_p must be a number in (0, 1], got 5" in caplog.text


@pytest.mark.model
async def test_the_default_model_answers_as_its_card_recommends(
    smollm2_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "brlite.llm")
    spec = ModelSpec(build_seq=256, build_batch=1)

    for generation_config, expected in (("model", {"temperature": 0.2, "top_p": 0.9}), ("none", {})):
        model = msgspec.structs.replace(spec, generation_config=generation_config)
        async with AsyncEngine.from_config(Config(model=(model,))) as engine:
            assert engine.sampling_defaults == expected
    assert caplog.text.count("sampling defaults of its model card: temperature 0.2, top_p 0.9") == 1


@pytest.mark.torch
async def test_they_can_be_turned_off(folder: Path) -> None:
    write_generation_config(folder, temperature=0.25)
    whole = config(folder, ENGINES["torch"])
    off = msgspec.structs.replace(whole, model=(msgspec.structs.replace(whole.model[0], generation_config="none"),))

    async with AsyncEngine.from_config(whole) as engine:
        assert engine.sampling_defaults == {"temperature": 0.25}
    async with AsyncEngine.from_config(off) as engine:
        assert engine.sampling_defaults == {}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", completion_body("hello")),
        ("/v1/chat/completions", chat_body("hello")),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 16}),
    ],
)
async def test_a_request_has_them_unless_it_says_otherwise(
    make_client: MakeClient,  # noqa: F811
    path: str,
    body: dict[str, Any],
) -> None:
    client = await make_client(sampling_defaults={"temperature": 0.0})
    body = {name: value for name, value in body.items() if name != "temperature"}

    by_default = [json.dumps(without_ids(await client.post(path, body))) for _ in range(3)]
    own = {json.dumps(without_ids(await client.post(path, {**body, "temperature": 1.0}))) for _ in range(4)}

    assert len(set(by_default)) == 1
    assert len(own) > 1
    if path == "/v1/completions":
        assert bytes(reference_tokens(b"hello", 8)).decode() in by_default[0]


def without_ids(found: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    status, answer = found
    assert status == 200, answer
    answer = {name: value for name, value in answer.items() if name not in ("id", "created", "created_at", "usage")}
    for item in answer.get("output", ()):
        item.pop("id", None)
    return {name: value for name, value in answer.items() if name != "completed_at"}

"""Models with a scoring head, from their files to the answer over HTTP, beside transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, processors

from brlite import AsyncEngine, Config
from brlite.app import create_app
from brlite.commands.cli import main
from brlite.config.options import EngineConfig, LimitsConfig, ModelSpec
from brlite.errors import ModelError
from brlite.http.listen import HttpServer
from tests.tiny_models import LLAMA, QWEN2, QWEN3, random_arrays, write_byte_tokenizer

pytestmark = pytest.mark.torch

QUERY = "which river is it? "
DOCUMENTS = ["The Rhine.", "A cat sleeps.", "Rivers flow to the sea, and this one does, too.", "x"]


def write_scorer(path: Path, base: dict[str, Any], *, num_labels: int = 1, **config: Any) -> Path:
    """A tiny model with a scoring head, and a tokenizer that begins each text of a pair with <s>."""
    architecture = base["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    labels = {str(number): f"LABEL_{number}" for number in range(num_labels)}
    config = {**base, "architectures": [architecture], "id2label": labels, "pad_token_id": 0, **config}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    arrays = random_arrays(config, seed=3)
    arrays["score.weight"] = np.random.default_rng(4).standard_normal((num_labels, 64), np.float32)
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    write_byte_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


async def ask(path: Path, endpoint: str, body: dict[str, Any], **engine: Any) -> dict[str, Any]:
    config = Config(
        model=(ModelSpec(name="tiny", path=str(path), build_seq=128, build_batch=4),),
        engine=EngineConfig(**{"device": "cpu", "max_num_batched_tokens": 16, **engine}),
    )
    async with (
        AsyncEngine.from_config(config) as async_engine,
        HttpServer(create_app(async_engine, config), "127.0.0.1", 0, LimitsConfig()) as server,
        aiohttp.ClientSession() as session,
        session.post(server.url + endpoint, json=body) as response,
    ):
        answer = await response.json()
        assert response.status == 200, answer
        assert isinstance(answer, dict)
        return answer


def transformers_logits(path: Path) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    with torch.inference_mode():
        return [
            float(model(torch.tensor([tokenizer(QUERY, document)["input_ids"]])).logits[0, 0]) for document in DOCUMENTS
        ]


@pytest.mark.parametrize("base", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
async def test_scores_are_transformers_logits_and_their_sigmoids(tmp_path: Path, base: dict[str, Any]) -> None:
    path = write_scorer(tmp_path / "tiny", base)
    expected = transformers_logits(path)
    pairs = {"text_1": QUERY, "text_2": DOCUMENTS}

    scored = await ask(path, "/v1/score", {**pairs, "use_activation": False}, dtype="float32", backend="torch")
    ranked = await ask(path, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}, dtype="float32", backend="torch")
    native = await ask(path, "/v1/score", {**pairs, "use_activation": False}, backend="native")

    logits = np.array([item["score"] for item in scored["data"]])
    order = np.argsort(-np.array(expected)).tolist()
    assert np.abs(logits - expected).max() < 1e-4
    assert [item["index"] for item in ranked["results"]] == order
    sigmoids = 1 / (1 + np.exp(-np.array(expected)[order]))
    assert np.abs(np.array([item["relevance_score"] for item in ranked["results"]]) - sigmoids).max() < 1e-4
    # In bfloat16, whose rounding is some tenths where logits are some tens.
    assert np.abs(np.array([item["score"] for item in native["data"]]) - expected).max() < 0.05 * np.ptp(expected)


@pytest.mark.parametrize(
    "config",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
    ids=["now", "before 4.0"],
)
async def test_a_models_own_activation_is_the_default(tmp_path: Path, config: dict[str, Any]) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA, **config)
    body = {"query": QUERY, "documents": DOCUMENTS}

    plain, raw = await ask(path, "/v1/rerank", body), await ask(path, "/v1/rerank", {**body, "use_activation": False})

    assert plain["results"] == raw["results"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_labels": 3}, r"score.weight has shape \[3, 64\]; a model that scores has one label: \[1, 64\]"),
        ({"sentence_transformers": {"activation_fn": "evil.Module"}}, "must be Sigmoid or Identity, got 'evil.Module'"),
    ],
)
async def test_what_is_no_scoring_head_is_refused_at_load(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA, **options)

    with pytest.raises(ModelError, match=words):
        await ask(path, "/v1/score", {"text_1": "a", "text_2": "b"})


@pytest.mark.parametrize("value", [None, np.nan])
async def test_a_head_that_is_missing_or_not_finite_is_refused_at_load(tmp_path: Path, value: float | None) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA)
    arrays = random_arrays(json.loads((path / "config.json").read_text()), seed=3)
    if value is not None:
        arrays["score.weight"] = np.full((1, 64), value, np.float32)
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"score.weight (is missing|holds numbers that are not finite)"):
        await ask(path, "/v1/score", {"text_1": "a", "text_2": "b"})


def test_a_model_with_a_scoring_head_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_scorer(tmp_path / "tiny", LLAMA)
    order = ["--model_name", "org/tiny", "--model_dir", str(path), "--output_dir", str(tmp_path / "out")]

    status = main(["convert", *order])

    assert status != 0
    assert "a bundle has no place for a scoring head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

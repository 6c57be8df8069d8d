"""Embedding models as they are saved: without a head, and without the name of their body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from brlite import LLM, Config, PoolingParams
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import InvalidRequest, ModelError
from tests.tiny_models import LLAMA, MISTRAL, QWEN3, write_byte_tokenizer, write_model

TOKEN_IDS = [5, 17, 200, 3, 3, 90, 41]


def write_embedding_model(path: Path, config: dict[str, Any], architecture: str) -> Path:
    """As `AutoModel` saves it, with the files of sentence-transformers."""
    write_model(path, config)
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    write_byte_tokenizer(path)
    return path


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("config", "architecture", "generates"),
    [
        (MISTRAL, "MistralModel", False),
        ({**QWEN3, "tie_word_embeddings": True}, "Qwen3ForCausalLM", True),
        (LLAMA, "LlamaModel", False),
    ],
    ids=["mistral", "qwen3-tied", "llama"],
)
def test_an_embedding_model_gives_embeddings_and_says_if_it_cannot_generate(
    tmp_path: Path, config: dict[str, Any], architecture: str, generates: bool, backend: Any
) -> None:
    path = write_embedding_model(tmp_path / "tiny", config, architecture)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([TOKEN_IDS])).last_hidden_state[0].double().mean(dim=0).numpy()

    spec = ModelSpec(name="tiny", path=str(path), build_seq=64, build_batch=2)
    engine = EngineConfig(device="cpu", backend=backend, dtype="auto" if backend == "native" else "float32")
    with LLM(config=Config(model=(spec,), engine=engine)) as llm:
        [output] = llm.embed([TOKEN_IDS], PoolingParams(normalize=False))
        if generates:
            assert llm.generate("hello")[0].outputs[0].token_ids
        else:
            with pytest.raises(InvalidRequest, match="no head") as caught:
                llm.generate("hello")
            assert caught.value.code == "no_language_model_head"

    tolerance = 0.01 * np.linalg.norm(expected) if backend == "native" else 1e-4
    assert np.linalg.norm(np.asarray(output.embedding) - expected) < tolerance


def test_a_head_that_is_missing_where_the_config_has_one_is_named(tmp_path: Path) -> None:
    path = write_embedding_model(tmp_path / "tiny", LLAMA, "LlamaForCausalLM")

    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        LLM(config=Config(model=(ModelSpec(name="tiny", path=str(path), build_seq=64),)))


def test_tensors_of_other_names_are_shown(tmp_path: Path) -> None:
    path = write_model(tmp_path, LLAMA)
    tensors = load_file(path / "model.safetensors")
    save_file({f"language_model.{name}": value for name, value in tensors.items()}, path / "model.safetensors")

    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight.* missing; .* names like 'language_model\."):
        check_model(open_checkpoint(path), ModelSpec(name="tiny", build_seq=64))

"""The manual's two models that transformers has no class for, from their folders to text: tokenizer, weights, chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.llm import LLM
from brlite.sampling_params import SamplingParams
from tests.models import reference_baichuan, reference_chatglm
from tests.tiny_models import BAICHUAN, CHATGLM, random_tensors, write_model
from tests.tokenizer.conftest import train_sentencepiece

VOCAB_SIZE = 520
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好, fox"}]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

Logits = Callable[[dict[str, Any], dict[str, Tensor], list[int]], Tensor]
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], Logits]] = {
    "baichuan": (
        BAICHUAN | {"vocab_size": VOCAB_SIZE},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<reserved_106>", "<reserved_107>"]},
        reference_baichuan.logits,
    ),
    "chatglm": (CHATGLM | {"padded_vocab_size": VOCAB_SIZE}, {}, reference_chatglm.logits),
}


def greedy_reference(name: str, token_ids: list[int]) -> list[int]:
    """What the reference says next, token by token, all computed anew each time."""
    config, _, logits = MODELS[name]
    weights, found = random_tensors(config), list(token_ids)
    with torch.inference_mode():
        for _ in range(8):
            found.append(int(logits(config, weights, found)[-1].argmax()))
    return found[len(token_ids) :]


@pytest.mark.parametrize("name", MODELS)
def test_a_chat_is_answered_as_the_reference_answers_it(name: str, tmp_path: Path) -> None:
    config, options, _ = MODELS[name]
    train_sentencepiece(write_model(tmp_path, config), model_type="bpe", **options)
    spec = ModelSpec(name=name, path=str(tmp_path), build_seq=128, build_batch=2, vocab_size=VOCAB_SIZE)

    with LLM(config=Config(model=(spec,), engine=EngineConfig(dtype="float32", device="cpu"))) as llm:
        token_ids = llm.tokenizer.encode_chat(CHAT)
        (output,) = llm.generate([token_ids], GREEDY)

    assert output.outputs[0].token_ids == greedy_reference(name, token_ids)

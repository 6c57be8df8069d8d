"""Every family against transformers, or a reference beside this file where that has none; and every family against
itself: chunked, cached, batched, quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from brlite.backends.torch.decoder import Decoder
from brlite.models.config import KVDtype
from brlite.models.precision import PrecisionName
from brlite.models.registry import FAMILIES, find_family
from tests.backends.native_models import MODELS
from tests.models import reference_baichuan, reference_chatglm
from tests.models.steps import BLOCK_SIZE, LENGTH, Runner, load_tiny, random_ids
from tests.tiny_models import NETWORKS, TINY_CONFIGS, tiny_tensors, write_tiny_model

NUM_BLOCKS = LENGTH // BLOCK_SIZE
SCATTERED = list(range(2 * NUM_BLOCKS, 0, -2))
# Torch adds up products of one row and of many in different orders: with AVX-512 logits differed by 1.02e-5.
SAME_LOGITS = 5e-5
REFERENCES = {"baichuan": reference_baichuan.logits, "chatglm": reference_chatglm.logits}


def reference_logits(path: Path, name: str, token_ids: list[int]) -> Tensor:
    config = TINY_CONFIGS[name]
    if config["model_type"] in REFERENCES:
        return REFERENCES[config["model_type"]](config, tiny_tensors(name), token_ids)
    write_tiny_model(path, name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


def max_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def relative_difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture(params=NETWORKS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return load_tiny(request.param)


@pytest.mark.parametrize("configs", [TINY_CONFIGS, MODELS], ids=["tiny", "native"])
def test_every_family_has_models_for_the_tests(configs: dict[str, dict[str, Any]]) -> None:
    found = {find_family(config).model_type for config in configs.values()}

    assert found == {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_logits_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    token_ids = random_ids()
    expected = reference_logits(tmp_path, name, token_ids)

    logits = Runner(load_tiny(name)).whole(token_ids, SCATTERED)

    assert max_difference(logits, expected) <= 1e-4


@pytest.mark.parametrize("name", ["llama-linear-rope", "llama-dynamic-rope", "llama3-rope", "chatglm-rope-ratio"])
def test_rope_scaling_changes_what_the_plain_model_says(name: str) -> None:
    token_ids = random_ids()

    scaled, plain = (
        Runner(load_tiny(model)).whole(token_ids, SCATTERED) for model in (name, TINY_CONFIGS[name]["model_type"])
    )

    assert max_difference(scaled, plain) > 0.1


def test_sliding_window_hides_what_is_further_back() -> None:
    token_ids = random_ids()

    narrow, wide = (Runner(load_tiny(model)).whole(token_ids, SCATTERED) for model in ("mistral-window", "mistral"))

    assert max_difference(narrow[:11], wide[:11]) <= SAME_LOGITS
    assert max_difference(narrow[11:], wide[11:]) > 0.1


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [7, 13, 20], [39, 1], [16, 1, 1, 1, 1, 20]])
def test_chunked_prompt_gives_the_same_logits_as_a_whole_one(decoder: Decoder, sizes: list[int]) -> None:
    token_ids = random_ids()
    expected = Runner(decoder).whole(token_ids, SCATTERED)

    logits = Runner(decoder).chunked(token_ids, SCATTERED, sizes)

    assert max_difference(logits, expected) <= SAME_LOGITS


def test_blocks_shared_by_two_sequences_serve_both_as_their_own_would(decoder: Decoder) -> None:
    prefix = random_ids(3 * BLOCK_SIZE)
    token_ids = prefix + random_ids(LENGTH - len(prefix), seed=2)
    expected = Runner(decoder).whole(token_ids, SCATTERED)[len(prefix) :]
    runner = Runner(decoder)
    runner.whole(prefix + random_ids(9, seed=3), [4, 7, 1, 30, 31, 32])

    logits = runner.step([(len(prefix), token_ids[len(prefix) :], [4, 7, 1, *range(33, 40)])])[0]

    assert max_difference(logits, expected) <= SAME_LOGITS


def test_sequences_in_one_step_compute_what_each_would_alone(decoder: Decoder) -> None:
    prompts = [random_ids(length, seed=length) for length in (3, 8, 17, 5)]
    tables = [list(range(12 * index, 12 * index + 12)) for index in range(4)]
    together, apart = Runner(decoder), Runner(decoder)
    for runner in (together, apart):
        for prompt, table in zip(prompts[:3], tables[:3], strict=True):
            runner.whole(prompt, table)
    decodes = [(len(prompt), [11], table) for prompt, table in zip(prompts[:3], tables[:3], strict=True)]
    pieces = [decodes[0], (0, prompts[3], tables[3]), *decodes[1:]]

    logits = together.step(pieces)

    for row, piece in zip(logits, pieces, strict=True):
        assert max_difference(row, apart.step([piece])[0]) <= SAME_LOGITS


def test_an_unwritten_slot_of_a_reused_block_never_shows_even_if_a_nan_was_there(decoder: Decoder) -> None:
    token_ids = random_ids(6)
    expected = Runner(decoder).whole(token_ids, [5, 6])
    runner = Runner(decoder)
    poison = torch.full((8, decoder.config.num_kv_heads, decoder.config.head_dim), torch.nan)
    for layer in runner.cache.layers:
        layer.keys.write(torch.arange(20, 28), poison)
        layer.values.write(torch.arange(20, 28), poison)

    logits = runner.whole(token_ids, [5, 6])

    assert max_difference(logits, expected) <= SAME_LOGITS


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("precision", "kv_dtype", "allowed"), [("a_bf16_w_int8", "float32", 0.05), ("a_bf16_w_int8_kv_int8", "int8", 0.08)]
)
def test_int8_stays_close_to_bf16(name: str, precision: PrecisionName, kv_dtype: KVDtype, allowed: float) -> None:
    token_ids = random_ids()
    expected = Runner(load_tiny(name)).whole(token_ids, SCATTERED)

    logits = Runner(load_tiny(name, precision), kv_dtype=kv_dtype).whole(token_ids, SCATTERED)

    assert 0 < relative_difference(logits, expected) <= allowed


def test_int8_cache_gives_chunked_prompts_the_same_logits_as_whole_ones(decoder: Decoder) -> None:
    token_ids = random_ids()
    expected = Runner(decoder, kv_dtype="int8").whole(token_ids, SCATTERED)

    logits = Runner(decoder, kv_dtype="int8").chunked(token_ids, SCATTERED, [13, 7, 20])

    # A key on the edge between two int8 levels may fall to either side.
    assert max_difference(logits, expected) <= 3e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_computes_nearly_what_float32_does(name: str) -> None:
    token_ids = random_ids()
    expected = Runner(load_tiny(name)).whole(token_ids, SCATTERED)

    logits = Runner(load_tiny(name, dtype=torch.bfloat16), kv_dtype="bfloat16").whole(token_ids, SCATTERED)

    assert relative_difference(logits, expected) < 0.03

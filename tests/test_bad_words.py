"""Bad words in real engines, offline and embedded: what is banned is not in the answer, and the rest is as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from brlite.llm import LLM, AsyncEngine
from brlite.sampling_params import SamplingParams
from tests.test_structured_output import ENGINES, config

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.torch
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_each_engine_leaves_the_words_out_and_draws_the_rest_as_before(
    tiny_folder: Path, engine: dict[str, Any]
) -> None:
    with LLM(config=config(tiny_folder, engine)) as llm:
        letters = llm.tokenizer.encode(LETTERS, add_special_tokens=False)
        plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, allowed_token_ids=letters)
        free = llm.generate("x", plain)[0].outputs[0].text
        word, letter = free[5:8], free[20]
        without_word = SamplingParams(**{**given(plain), "bad_words": [word]})
        without_letter = SamplingParams(**{**given(plain), "bad_words": letter, "temperature": 2, "seed": 1})
        outputs = llm.generate("x", without_word), llm.generate(["x", "y"], without_letter)

    at = free.index(word) + 2
    first, *others = [each.outputs[0].text for output in outputs for each in output]
    assert (len(first), word in first) == (40, False)
    assert (first[:at], first[at] != free[at]) == (free[:at], True)
    assert all(letter not in text and len(text) == 40 for text in others)


async def test_an_embedded_engine_obeys_them_too(tiny_folder: Path) -> None:
    async with AsyncEngine.from_config(config(tiny_folder, ENGINES["toy"])) as engine:
        letters = engine.tokenizer.encode("abc", add_special_tokens=False)
        params = SamplingParams(max_tokens=20, seed=3, allowed_token_ids=letters, bad_words=["a", "bc"])
        text = "".join([output.outputs[0].text async for output in engine.generate("x", params)])

    assert len(text) == 20
    assert "a" not in text
    assert "bc" not in text


def given(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__}

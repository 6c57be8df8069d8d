"""The toy: what it says, how its faults are set, and that its tokenizer is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from brlite.backends.plugins.calls import NO_TOKENS
from brlite.backends.plugins.contract import BringsTokenizer, PluginRow
from brlite.backends.plugins.toy import CERTAINTY, ToyEngine, next_token, token_logits
from brlite.backends.plugins.toy_text import ASSISTANT, END, NAMES, SYSTEM, USER, VOCAB_SIZE, toy_tokenizer
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import ConfigError, EngineError, InvalidRequest

SPEC = ModelSpec(name="toy", build_seq=64, build_batch=2)
TOKENIZER = toy_tokenizer()


def answer(token_ids: list[int], num_tokens: int) -> str:
    """What it says, most probable token after most probable token."""
    context = list(token_ids)
    for _ in range(num_tokens):
        context.append(int(token_logits(np.array(context, np.int32)).argmax()))
    return TOKENIZER.decode(context[len(token_ids) :], skip_special_tokens=False)


def opened(**options: Any) -> tuple[ToyEngine, list[float]]:
    """A toy, and the times that it slept."""
    naps: list[float] = []
    toy = ToyEngine(naps.append)
    toy.open(SPEC, EngineConfig(name="toy", options=options))
    return toy, naps


def rows(*token_ids: list[int], start: int = 0) -> list[PluginRow]:
    return [PluginRow(slot, start if each else 0, np.array(each, np.int32)) for slot, each in enumerate(token_ids)]


# What it says


@pytest.mark.parametrize("text", ["The sea is", "x", "", "描述一下夏天🌞", "<|user|> is a text"])
def test_it_says_again_what_it_was_told_and_ends(text: str) -> None:
    token_ids = TOKENIZER.encode(text)

    said = answer(token_ids, len(text.encode()) + 1)

    assert said == f"{text}<|end|>"


def test_made_to_go_on_it_says_it_once_more() -> None:
    assert answer(TOKENIZER.encode("ab"), 8) == "ab<|end|>ab<|end|>ab"


def test_a_chat_is_answered_with_the_users_last_words() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]

    token_ids = TOKENIZER.encode_chat(chat)

    assert answer(token_ids, 4) == "bye<|end|>"
    assert [token_id for token_id in token_ids if token_id > 255] == [SYSTEM, USER, ASSISTANT, END, USER, ASSISTANT]


def test_a_chat_of_one_message_is_a_completion() -> None:
    assert TOKENIZER.encode_chat([{"role": "user", "content": "hi"}]) == TOKENIZER.encode("hi")


def test_plain_token_ids_get_the_alphabet() -> None:
    assert answer([1, 2, 3], 4) == "defg"
    assert next_token([]) == ord("a")


def test_every_token_of_a_context_shows_in_its_logits() -> None:
    context = np.arange(40, dtype=np.int32)
    expected = token_logits(context)

    for index in range(40):
        other = context.copy()
        other[index] += 1
        assert not np.array_equal(token_logits(other), expected)


def test_noise_is_text_and_what_comes_next_is_certain() -> None:
    logits = token_logits(np.array([1, 2, 3], np.int32))

    assert logits.dtype == np.float32
    assert logits[ord("d")] == CERTAINTY == logits.max()
    assert np.abs(np.delete(logits, ord("d"))[32:126]).max() <= 2
    assert logits[:32].max() < -20 > logits[127:].max()


# Its tokenizer


def test_its_tokenizer_is_its_own_and_covers_its_logits() -> None:
    toy = ToyEngine()

    assert isinstance(toy, BringsTokenizer)
    assert toy.tokenizer().vocab_size == VOCAB_SIZE
    assert toy.tokenizer().eos_token_ids == (END,)


@pytest.mark.parametrize("text", ["", "plain", "né 夏天🌞\n", "<|assistant|>"])
def test_text_survives_its_tokenizer(text: str) -> None:
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)

    assert TOKENIZER.decode(token_ids) == text
    assert not set(token_ids) & set(NAMES)


@pytest.mark.parametrize("message", [{"role": "robot", "content": "x"}, {"role": "user", "content": ["x"]}, {}])
def test_a_chat_that_it_cannot_say_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="Error in applying chat template from request"):
        TOKENIZER.encode_chat([message])


# Its options


def test_it_takes_its_time() -> None:
    toy, naps = opened(start_seconds=3, tokens_per_second=20, prompt_tokens_per_second="100")

    toy.step(rows([1, 2, 3, 4], []))
    toy.step(rows([5], [], start=4))

    assert naps == [3, 0.04, 0.05]


def test_it_fails_and_spoils_as_often_as_it_is_told() -> None:
    toy, _ = opened(fail_every=3, nan_every=2)
    toy.step(rows([1], []))

    spoilt = toy.step(rows([1], [], start=1))
    with pytest.raises(EngineError, match="step 3 fails"):
        toy.step(rows([1], [], start=2))

    assert np.isnan(spoilt[0]).all()


def test_a_step_that_fails_changes_nothing() -> None:
    toy, _ = opened(fail_every=2)
    toy.step(rows([7], []))
    with pytest.raises(EngineError):
        toy.step(rows([8], [], start=1))

    logits = toy.step(rows([9], [], start=1))

    assert np.array_equal(logits[0], token_logits(np.array([7, 9], np.int32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 3}, "speed = 3: no such field; allowed are start_seconds, tokens_per_second, "),
        ({"tokens_per_second": -1}, "tokens_per_second = -1: allowed is a number from 0 to "),
        ({"fail_every": "often"}, 'fail_every = "often": allowed is a whole number from 0 to '),
    ],
)
def test_an_option_that_is_wrong_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        opened(**options)

    assert str(refusal.value).startswith(f"engine toy, options: {message}")


def test_a_closed_toy_does_nothing() -> None:
    toy, _ = opened()
    toy.close()
    toy.close()

    with pytest.raises(EngineError, match="closed"):
        toy.step([PluginRow(0, 0, NO_TOKENS)])

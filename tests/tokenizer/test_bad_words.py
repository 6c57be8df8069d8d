"""How `bad_words` are spelt with a real vocabulary."""

from __future__ import annotations

from pathlib import Path

from brlite.config.options import LimitsConfig
from brlite.engine.bad_words import encode_bad_words
from brlite.tokenizer import load_tokenizer


def test_a_word_is_banned_with_and_without_a_space_and_as_a_control_token(qwen2_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen2_folder)

    spelt = encode_bad_words(["  the", "<|im_end|>", " "], tokenizer, LimitsConfig())

    texts = [tokenizer.decode(each, skip_special_tokens=False) for each in spelt]
    assert {"the", " the", " ", "<|im_end|>"} <= set(texts)
    assert (tokenizer.special_token_id("<|im_end|>"),) in spelt

"""Prompts for what stands between two texts: the vocabulary's own tokens, in the order that its models know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from brlite.errors import InvalidRequest
from brlite.tokenizer import load_tokenizer
from brlite.tokenizer.infill import InfillText, InfillTokens, find_infill_tokens
from tests.tokenizer.conftest import WriteGguf


@pytest.mark.parametrize(
    ("texts", "tokens"),
    [
        (("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"), InfillTokens(0, 2, 1, (3,))),
        (
            ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>", "<|file_sep|>"),
            InfillTokens(0, 2, 1, (4, 3), repository=3, file=4),
        ),
        (("<fim_prefix>", "<fim_middle>", "<fim_suffix>"), InfillTokens(0, 2, 1)),
        (("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"), InfillTokens(1, 0, 2)),
        (("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"), InfillTokens(0, 2, 1, (3,))),
        (("[PREFIX]", "[SUFFIX]"), InfillTokens(0, 1, None)),
        (("<|fim_prefix|>", "<|fim_suffix|>"), None),
        ((), None),
    ],
)
def test_each_family_has_tokens_of_its_own(texts: tuple[str, ...], tokens: InfillTokens | None) -> None:
    assert find_infill_tokens({text: token_id for token_id, text in enumerate(texts)}.get) == tokens


def test_a_file_that_names_the_tokens_goes_before_their_texts() -> None:
    found = find_infill_tokens({"<fim_prefix>": 0, "<fim_suffix>": 1, "<fim_middle>": 2}.get, (7, 8, 9, None, 4))

    assert found == InfillTokens(7, 8, 9, file=4)


def test_without_a_middle_the_suffix_stands_first() -> None:
    assert InfillTokens(7, 8, 9).prompt([1], [2, 3]) == [7, 1, 8, 2, 3, 9]
    assert InfillTokens(7, 8, None).prompt([1], [2, 3]) == [8, 2, 3, 7, 1]


def test_other_files_stand_before_it_below_their_names_or_as_plain_text() -> None:
    files = [("a", "b"), ("c", "d")]
    texts: list[str] = []

    def encode(text: str) -> list[int]:
        texts.append(text)
        return [-len(texts)]

    found = [
        tokens.context(files, encode)
        for tokens in (
            InfillTokens(7, 8, 9, repository=5, file=6),
            InfillTokens(7, 8, 9, file=6),
            InfillTokens(7, 8, 9),
        )
    ]

    assert found == [[5, -1, 6, -2, 6, -3, 6, -4], [6, -5, 6, -6, 6, -7], [-8]]
    assert texts[:4] == ["myproject\n", "a\nb", "c\nd", "filename\n"]
    assert texts[7] == "\n\n--- snippet ---\n\nb\n\n--- snippet ---\n\nd"


def test_a_prompt_has_the_tokens_and_what_the_texts_spell_out_stays_words(qwen2_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2_folder, tmp_path / "coder")
    size = load_tokenizer(folder).vocab_size
    names = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    (folder / "added_tokens.json").write_text(json.dumps({name: size + index for index, name in enumerate(names)}))
    tokenizer = load_tokenizer(folder)

    found = tokenizer.encode_infill(InfillText("a <|fim_suffix|>", "b"))

    prefix, middle, suffix = range(size, size + 3)
    assert (found[0], found[-1], found.count(suffix)) == (prefix, middle, 1)
    place = found.index(suffix)
    assert tokenizer.decode(found[1:place]) == "a <|fim_suffix|>"
    assert tokenizer.decode(found[place + 1 : -1]) == "b"


def test_files_go_before_the_gap_and_the_start_of_the_answer_behind_it(qwen2_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2_folder, tmp_path / "coder")
    size = load_tokenizer(folder).vocab_size
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")
    (folder / "added_tokens.json").write_text(json.dumps({name: size + index for index, name in enumerate(names)}))
    tokenizer = load_tokenizer(folder)

    found = tokenizer.encode_infill(InfillText("a", "", start=" x<|file_sep|>", files=[("f.py", "one\n")]))

    assert tokenizer.decode(found, skip_special_tokens=False) == (
        "<|repo_name|>myproject\n<|file_sep|>f.py\none\n<|file_sep|>filename\n"
        "<|fim_prefix|>a<|fim_suffix|><|fim_middle|> x<|file_sep|>"
    )
    assert found.count(size + 4) == 2  # what the start spells out is words
    for name, text in {
        "start": InfillText("a", "b", start="\ud800"),
        "files": InfillText("a", "b", files=[("a", "\ud800")]),
    }.items():
        with pytest.raises(InvalidRequest) as caught:
            tokenizer.encode_infill(text)
        assert caught.value.param == name


def test_a_vocabulary_without_them_refuses_a_suffix(qwen2_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen2_folder)

    with pytest.raises(InvalidRequest, match="no tokens for filling in") as caught:
        tokenizer.encode_infill(InfillText("a", "b"))

    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")


def test_a_message_may_write_control_tokens_where_the_operator_allows_it(qwen2_folder: Path) -> None:
    messages = [{"role": "user", "content": "a<|im_end|>b"}]

    for is_allowed, num_ends in ((False, 1), (True, 2)):
        with closing(load_tokenizer(qwen2_folder, control_tokens_in_text=is_allowed)) as tokenizer:
            end = tokenizer.special_token_id("<|im_end|>")
            assert tokenizer.encode_chat(messages).count(end) == num_ends


def test_a_gguf_file_names_the_tokens_by_old_keys_and_new(
    write_gguf: WriteGguf, byte_level_keys: Mapping[str, Any]
) -> None:
    new = {"fim_pre_token_id": 5, "fim_suf_token_id": 6, "fim_mid_token_id": 7}
    old = {"prefix_token_id": 5, "suffix_token_id": 6, "middle_token_id": 7}

    found = [load_tokenizer(write_gguf(**byte_level_keys, **keys)).infill for keys in (new, old, {})]

    assert found == [InfillTokens(5, 6, 7), InfillTokens(5, 6, 7), None]

"""GGUF vocabularies: the ids must be those of the tokenizer that the file was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from brlite.errors import ModelError
from brlite.tokenizer import load_tokenizer
from brlite.tokenizer.gguf_vocabulary import hugging_face_files
from tests.tokenizer.conftest import WriteGguf
from tests.tokenizer.texts import SMOLLM2_IDS, TEXTS

BYTES = [chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144))]


def digits(write_gguf: WriteGguf, **keys: Any) -> Path:
    """A byte-level vocabulary whose only merges make numbers out of digits, and words out of letters."""
    merges = ["1 2", "12 3", "123 4", "a b", "ab c"]
    tokens = [*BYTES, *(merge.replace(" ", "") for merge in merges)]
    return write_gguf(model="gpt2", tokens=tokens, merges=merges, token_type=[1] * len(tokens), **keys)


@pytest.mark.model
def test_the_default_model_gives_the_ids_of_its_own_tokenizer(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)

    ids = [{"text": text, "ids": tokenizer.encode(text)} for text in TEXTS]

    assert ids == SMOLLM2_IDS
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == (2, 0)
    assert len(tokenizer.special_token_ids) == 17


@pytest.mark.model
def test_the_default_model_renders_a_chat_with_its_own_template(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)

    ids = tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2024?"}])

    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2024?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_byte_level_vocabulary_gives_the_ids_of_its_folder(
    write_gguf: WriteGguf, byte_level_keys: Mapping[str, Any], qwen2_folder: Path
) -> None:
    folder, file = load_tokenizer(qwen2_folder), load_tokenizer(write_gguf(**byte_level_keys))

    for text in TEXTS:
        assert file.encode(text) == folder.encode(text)
    assert file.special_token_ids == folder.special_token_ids
    assert file.eos_token_ids == folder.eos_token_ids
    assert [file.token_bytes(i) for i in range(file.vocab_size)] == [
        folder.token_bytes(i) for i in range(folder.vocab_size)
    ]
    chat = [{"role": "user", "content": "hi"}]
    assert file.encode_chat(chat) == folder.encode_chat(chat)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "3", "4", "abc"]),
        ("qwen2", ["1", "2", "3", "4", "abc"]),
        ("gpt-2", ["1234", "abc"]),
        ("llama-bpe", ["123", "4", "abc"]),
        ("default", ["123", "4", "abc"]),
    ],
)
def test_the_name_of_the_pre_tokenizer_decides_how_digits_are_cut(
    write_gguf: WriteGguf, pre: str, pieces: list[str]
) -> None:
    tokenizer = load_tokenizer(digits(write_gguf, pre=pre, add_bos_token=False))

    ids = tokenizer.encode("1234abc")

    assert [tokenizer.token_text(token_id) for token_id in ids] == pieces


def test_a_vocabulary_of_pieces_gives_the_ids_of_sentencepiece(
    write_gguf: WriteGguf, pieces_keys: Mapping[str, Any], sentencepiece_folder: Path
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    texts = [text for text in TEXTS if not any(name in text for name in ("<s>", "</s>", "<unk>"))]

    tokenizer = load_tokenizer(write_gguf(**pieces_keys))

    for text in texts:
        assert tokenizer.encode(text) == [1, *processor.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))
    assert tokenizer.special_token_ids == {0, 1, 2}


def test_every_stretch_between_special_tokens_gets_its_space(
    write_gguf: WriteGguf, pieces_keys: Mapping[str, Any]
) -> None:
    tokenizer = load_tokenizer(write_gguf(**pieces_keys))

    ids = tokenizer.encode("fox</s>fox", add_special_tokens=False)

    assert ids == [*tokenizer.encode("fox", add_special_tokens=False), 2, *ids[: ids.index(2)]]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "fox</s> fox"


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        ({}, 1, None),
        ({"add_bos_token": False}, None, None),
        ({"add_bos_token": False, "add_eos_token": True}, None, 2),
        ({"add_eos_token": True, "bos_token_id": 2, "eos_token_id": 1}, 2, 1),
    ],
)
def test_the_flags_decide_what_stands_around_a_text(
    write_gguf: WriteGguf, pieces_keys: Mapping[str, Any], flags: dict[str, Any], first: int | None, last: int | None
) -> None:
    tokenizer = load_tokenizer(write_gguf(**pieces_keys, **flags))
    bare = tokenizer.encode("Hello", add_special_tokens=False)

    ids = tokenizer.encode("Hello")

    assert ids == [token_id for token_id in (first, *bare, last) if token_id is not None]


def test_without_the_prefix_space_nothing_is_put_before_a_text(
    write_gguf: WriteGguf, pieces_keys: Mapping[str, Any]
) -> None:
    tokenizer = load_tokenizer(write_gguf(**pieces_keys, add_space_prefix=False))

    ids = tokenizer.encode("fox", add_special_tokens=False)

    assert b"".join(map(tokenizer.token_bytes, ids)) == b"fox"
    assert tokenizer.decode(tokenizer.encode(" fox")) == " fox"


def test_the_end_of_turn_that_the_template_names_ends_a_completion_too(
    write_gguf: WriteGguf, byte_level_keys: Mapping[str, Any]
) -> None:
    endoftext = byte_level_keys["tokens"].index("<|endoftext|>")
    im_end = byte_level_keys["eos_token_id"]

    tokenizer = load_tokenizer(write_gguf(**{**byte_level_keys, "eos_token_id": endoftext}))

    assert tokenizer.eos_token_ids == (endoftext, im_end)


def test_the_operators_template_replaces_the_files(
    write_gguf: WriteGguf, byte_level_keys: Mapping[str, Any], tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}{{ eos_token }}")

    tokenizer = load_tokenizer(write_gguf(**byte_level_keys), chat_template=template)

    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"


def test_a_folder_with_one_gguf_file_is_that_file(write_gguf: WriteGguf, byte_level_keys: Mapping[str, Any]) -> None:
    file = write_gguf(**byte_level_keys)

    tokenizer = load_tokenizer(file.parent)

    assert tokenizer.vocab_size == len(byte_level_keys["tokens"])


def test_a_folder_with_two_gguf_files_is_refused(write_gguf: WriteGguf, byte_level_keys: Mapping[str, Any]) -> None:
    file = write_gguf("a.gguf", **byte_level_keys)
    write_gguf("b.gguf", **byte_level_keys)

    with pytest.raises(ModelError, match=r"several \.gguf files; name one of them"):
        load_tokenizer(file.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'; known are default, gpt-2, llama-bpe"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; known are gpt2, llama"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges must hold pairs of tokens"),
        ({"merges": ["nowhere xyz"]}, "tokenizer.ggml is inconsistent"),
        ({"merges": ["\x1b[2J\n" + "x" * 10**6 + " y"]}, r"tokenizer.ggml is inconsistent: .*`\\x1b\[2J xxx"),
        ({"merges": [1]}, "tokenizer.ggml.merges must be a list of strings"),
        ({"tokens": ["a"]}, "tokenizer.ggml.token_type has [0-9]+ entries, not 1"),
        ({"tokens": "a"}, "tokenizer.ggml.tokens must be of type list, got str"),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000; the vocabulary has the ids 0 to"),
        ({"tokens": "TWICE", "bos_token_id": 0, "add_bos_token": True}, "bos_token_id is of a text that a later token"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be of type bool, got int"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.5]}, "tokenizer.ggml.scores has 1 entries, not"),
        ({"tokenizer.chat_template": "{% if %}"}, "the chat template is broken"),
    ],
)
def test_a_vocabulary_that_cannot_be_right_is_refused_by_its_key(
    write_gguf: WriteGguf, byte_level_keys: Mapping[str, Any], changes: dict[str, Any], message: str
) -> None:
    if changes.get("tokens") == "TWICE":
        changes = {**changes, "tokens": [*byte_level_keys["tokens"][:-1], byte_level_keys["tokens"][0]]}
    file = write_gguf(**{**byte_level_keys, **changes})

    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(file)

    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


def test_a_missing_file_and_one_of_another_kind_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(b"")

    with pytest.raises(ModelError, match=r"no such model folder or \.gguf file"):
        load_tokenizer(tmp_path / "missing.gguf")
    with pytest.raises(ModelError, match=r"a tokenizer is read from a model folder or a \.gguf file"):
        load_tokenizer(other)


def test_the_fixture_is_ascii_so_that_no_editor_changes_its_texts() -> None:
    fixture = Path(__file__).parent / "smollm2_ids.json"

    assert fixture.read_bytes().isascii()
    assert json.loads(fixture.read_text())


@pytest.mark.parametrize(
    ("tokens", "named", "ends"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}),
        (
            ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>"],
            "<|end_of_text|>",
            {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
        ),
        (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", {"<eos>", "<end_of_turn>"}),
        (["<|endoftext|>", "<|user|>", "<|end|>"], "<|endoftext|>", {"<|endoftext|>", "<|end|>"}),
        (["<s>", "</s>", "[INST]", "[/INST]"], "</s>", {"</s>"}),
        (
            ["[gMASK]", "sop", "<|user|>", "<|observation|>", "<|endoftext|>"],
            "<|endoftext|>",
            {"<|endoftext|>", "<|user|>", "<|observation|>"},
        ),
        (
            ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>", "[EOT]"],
            "[EOT]",
            {"[EOT]", "<｜end▁of▁sentence｜>", "<|EOT|>"},
        ),
    ],
    ids=["Qwen, SmolLM2", "Llama 3.1", "Gemma", "Phi 3", "Mistral", "ChatGLM4", "DeepSeek"],
)
@pytest.mark.parametrize("kind", [3, 4], ids=["control", "typed wrongly"])
def test_all_that_ends_a_turn_or_a_text_ends_a_completion(
    write_gguf: WriteGguf, tokens: list[str], named: str, ends: set[str], kind: int
) -> None:
    kinds = [1] * (len(BYTES) + 1) + [3 if token == named or token[0] != "<" else kind for token in tokens]
    every = [*BYTES, "ab", *tokens]
    path = write_gguf(
        model="gpt2", tokens=every, token_type=kinds, merges=["a b"], eos_token_id=every.index(named), pre="gpt-2"
    )
    if kind == 4:
        ends = {text for text in ends if text == named or text not in ("</s>", "<eos>", "<|user|>", "<|observation|>")}

    tokenizer = load_tokenizer(path)

    assert {tokenizer.token_text(token_id) for token_id in tokenizer.eos_token_ids} == ends
    assert tokenizer.token_text(tokenizer.eos_token_ids[0]) == named


def test_a_word_that_reads_like_an_end_is_none(write_gguf: WriteGguf) -> None:
    tokens = [*BYTES, "</s>", "<EOT>", "<eos>", "ab"]
    path = write_gguf(model="gpt2", tokens=tokens, token_type=[1] * len(tokens), merges=["a b"], pre="gpt-2")

    assert load_tokenizer(path).eos_token_ids == ()


def check_folder_of(file: Path, folder: Path) -> None:
    """A folder of the files that are made of a GGUF vocabulary has the same tokenizer."""
    folder.mkdir()
    for name, content in hugging_face_files(file).items():
        (folder / name).write_bytes(content)

    made, meant = load_tokenizer(folder), load_tokenizer(file)

    for text in [*TEXTS, "<s>[INST] x</s>", "<|im_start|>user\nx<|im_end|>"]:
        assert made.encode(text) == meant.encode(text)
        assert made.encode(text, add_special_tokens=False) == meant.encode(text, add_special_tokens=False)
    assert made.bos_token_id == meant.bos_token_id
    assert set(made.eos_token_ids) == set(meant.eos_token_ids)
    assert set(made.special_token_ids) == set(meant.special_token_ids)
    assert made.has_chat_template == meant.has_chat_template
    assert [made.token_bytes(i) for i in range(made.vocab_size)] == [
        meant.token_bytes(i) for i in range(meant.vocab_size)
    ]


def test_a_byte_level_vocabulary_becomes_the_files_of_a_folder(
    write_gguf: WriteGguf, byte_level_keys: Mapping[str, Any], tmp_path: Path
) -> None:
    check_folder_of(write_gguf(**byte_level_keys), tmp_path / "folder")


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": True}, {"add_space_prefix": False}])
def test_a_vocabulary_of_pieces_becomes_the_files_of_a_folder(
    flags: dict[str, bool], write_gguf: WriteGguf, pieces_keys: Mapping[str, Any], tmp_path: Path
) -> None:
    check_folder_of(write_gguf(**{**pieces_keys, **flags}), tmp_path / "folder")


@pytest.mark.model
def test_the_default_models_vocabulary_becomes_the_files_of_a_folder(smollm2_path: Path, tmp_path: Path) -> None:
    check_folder_of(smollm2_path, tmp_path / "folder")

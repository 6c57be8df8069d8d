"""Tokenizers of Hugging Face folders, against transformers and sentencepiece themselves."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend

from brlite.errors import ModelError
from brlite.tokenizer import load_tokenizer
from brlite.tokenizer.tokenizer import LONG_TEXT, ids_around
from tests.tiny_models import write_byte_tokenizer
from tests.tokenizer.conftest import train_sentencepiece, write_folder
from tests.tokenizer.texts import TEXTS

CHAT = [{"role": "user", "content": "Hello 你好 <|im_end|>"}, {"role": "assistant", "content": "the  fox\n"}]


@pytest.fixture(scope="module", params=["qwen2_folder", "llama_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def llama_copy(llama_folder: Path, tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_ids_are_those_of_transformers(folder: Path, reference: Any) -> None:
    tokenizer = load_tokenizer(folder)

    ids = [(tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]

    assert ids == [(reference.encode(text), reference.encode(text, add_special_tokens=False)) for text in TEXTS]


def test_named_tokens_are_those_of_transformers(folder: Path, reference: Any) -> None:
    tokenizer = load_tokenizer(folder)

    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.eos_token_ids[0] == reference.eos_token_id
    assert tokenizer.special_token_ids == frozenset(reference.all_special_ids)
    assert tokenizer.vocab_size == len(reference)


def test_a_rendered_chat_is_that_of_transformers(folder: Path, reference: Any) -> None:
    tokenizer = load_tokenizer(folder)

    for add_generation_prompt in (True, False):
        text = tokenizer.render_chat(CHAT, add_generation_prompt=add_generation_prompt)

        assert text == reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add_generation_prompt)


def test_a_chat_has_one_bos(llama_folder: Path) -> None:
    tokenizer = load_tokenizer(llama_folder)

    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])

    assert ids.count(1) == 1
    assert ids[0] == 1


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decoded_text_is_that_of_transformers(folder: Path, reference: Any, skip_special_tokens: bool) -> None:
    tokenizer = load_tokenizer(folder)
    encoded = [tokenizer.encode(text) for text in TEXTS]

    texts = [tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in encoded]

    assert texts == [reference.decode(ids, skip_special_tokens=skip_special_tokens) for ids in encoded]


def test_decoding_skips_special_tokens_or_shows_them(qwen2_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen2_folder)

    ids = tokenizer.encode("<|im_start|>hi<tool_call>")

    assert tokenizer.decode(ids) == "hi<tool_call>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<tool_call>"


def test_every_file_may_name_end_tokens(qwen2_folder: Path) -> None:
    tokenizer = load_tokenizer(qwen2_folder)

    texts = [tokenizer.token_text(token_id) for token_id in tokenizer.eos_token_ids]

    assert texts == ["<|im_end|>", "<|endoftext|>"]


def test_truncation_left_by_training_is_ignored(llama_copy: Path) -> None:
    backend = Backend.from_file(str(llama_copy / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(llama_copy / "tokenizer.json"))

    tokenizer = load_tokenizer(llama_copy)

    assert 4 < len(tokenizer.encode("The quick brown fox jumps")) < 64


def test_tokens_that_only_the_config_lists_are_added(llama_copy: Path) -> None:
    size = load_tokenizer(llama_copy).vocab_size
    edit(llama_copy / "tokenizer_config.json", added_tokens_decoder={str(size): {"content": "<tool>", "special": True}})

    tokenizer = load_tokenizer(llama_copy)

    assert tokenizer.encode("<tool>", add_special_tokens=False) == [size]
    assert size in tokenizer.special_token_ids


def test_added_tokens_of_another_vocabulary_are_refused(llama_copy: Path) -> None:
    write_folder(llama_copy, added_tokens={"<pad>": 32000})

    with pytest.raises(ModelError, match="added token '<pad>' cannot get the id 32000"):
        load_tokenizer(llama_copy)


def test_tokenizer_json_decides_about_bos_and_a_contradiction_is_logged(
    llama_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(llama_copy / "tokenizer_config.json", add_bos_token=False)

    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(llama_copy)

    assert tokenizer.encode("hi")[0] == 1
    assert "add_bos_token is False, but tokenizer.json decides otherwise" in caplog.text


def test_a_value_of_the_files_is_cut_and_escaped_in_the_log(llama_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(llama_copy / "tokenizer_config.json", add_eos_token="\x1b[2J\n" + "x" * 10**6)

    with caplog.at_level(logging.WARNING):
        load_tokenizer(llama_copy)

    (line,) = (record.getMessage() for record in caplog.records)
    assert "add_eos_token is '\\x1b[2J\\nxxx" in line
    assert line.isprintable()
    assert len(line) < 400


def test_a_bare_sentencepiece_model_is_read_as_sentencepiece_does(sentencepiece_folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    texts = [text for text in TEXTS if not any(name in text for name in ("<s>", "</s>", "<unk>"))]

    tokenizer = load_tokenizer(sentencepiece_folder)

    for text in texts:
        assert tokenizer.encode(text) == [1, *processor.encode(text)]
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2,)
    assert not tokenizer.has_chat_template


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def defined_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare model with symbols that its makers defined, as Gemma's and Mistral's have them."""
    return train_sentencepiece(
        tmp_path_factory.mktemp("defined"),
        model_type="bpe",
        add_dummy_prefix=request.param,
        user_defined_symbols=["<tool>", "▁▁▁", "▁quick"],
        control_symbols=["[INST]", "[/INST]"],
    )


def test_symbols_that_the_makers_defined_are_one_token_as_for_sentencepiece(defined_folder: Path) -> None:
    more = ["<tool>", "a<tool>b", "<tool> hello <tool><tool>", "x   y", "   x", "the quick brown fox", " <tool>", ""]
    control = ("<s>", "</s>", "<unk>")  # which are found in prompts, and not by sentencepiece
    texts = [text for text in [*TEXTS, *more] if not any(name in text for name in control)]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(defined_folder / "tokenizer.model"))
    tokenizer = load_tokenizer(defined_folder)

    found = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}

    assert found == {text: processor.encode(text) for text in texts}


@pytest.mark.parametrize(("legacy", "later"), [(None, "user"), (False, "user"), (True, " user")])
def test_only_the_first_stretch_has_a_space_before_it(
    sentencepiece_folder: Path, tmp_path: Path, legacy: bool | None, later: str
) -> None:
    folder = Path(shutil.copytree(sentencepiece_folder, tmp_path / "model"))
    write_folder(folder, tokenizer_config={} if legacy is None else {"legacy": legacy})
    tokenizer = load_tokenizer(folder)

    ids = tokenizer.encode("user</s>user", add_special_tokens=False)

    end = ids.index(2)
    assert tokenizer.decode(ids[:end]) == "user"
    assert b"".join(map(tokenizer.token_bytes, ids[end + 1 :])).decode() == later


def test_the_config_of_a_bare_sentencepiece_model_decides_about_bos_and_eos(
    sentencepiece_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sentencepiece_folder, tmp_path / "model"))
    write_folder(folder, tokenizer_config={"add_bos_token": False, "add_eos_token": True})

    ids = load_tokenizer(folder).encode("Hello")

    assert ids[0] != 1
    assert ids[-1] == 2


@pytest.mark.parametrize(
    "options",
    [{"model_type": "unigram", "vocab_size": 340}, {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}],
    ids=["unigram", "nfkc"],
)
def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    train_sentencepiece(tmp_path, **options)

    with pytest.raises(ModelError, match=r"convert the tokenizer to a tokenizer\.json"):
        load_tokenizer(tmp_path)


BROKEN_FILES = {
    "tokenizer.json": ["", "{", "{}", '{"model": {"type": "BPE"}}'],
    "tokenizer.model": ["", "not a sentencepiece model"],
    "tokenizer_config.json": [
        r'{"bos_token": "\ud800"}',
        "{",
        "[1]",
        '{"bos_token": 1}',
        '{"added_tokens_decoder": {"x": 1}}',
    ],
    "special_tokens_map.json": ["[" * 100_000, "null", '{"additional_special_tokens": 5}'],
    "added_tokens.json": ['{"<x>": "<y>"}', '{"<x>": null}', '{"<x>": 1e999}'],
    "generation_config.json": ['{"eos_token_id": "x"}', '{"eos_token_id": [true]}', '{"eos_token_id": -1}'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN_FILES.items() for text in texts])
def test_a_broken_file_is_one_clear_line(llama_copy: Path, name: str, text: str) -> None:
    if name == "tokenizer.model":
        (llama_copy / "tokenizer.json").unlink()
    (llama_copy / name).write_text(text)

    with pytest.raises(ModelError) as caught:
        load_tokenizer(llama_copy)

    assert str(llama_copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_decoder_is_refused(llama_copy: Path) -> None:
    backend = Backend.from_file(str(llama_copy / "tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(llama_copy / "tokenizer.json"))

    with pytest.raises(ModelError, match=r"its decoder \(WordPiece\) is not supported"):
        load_tokenizer(llama_copy)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json, tokenizer\.model or \.gguf file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "qwen.tiktoken", "tekken.json", "vocab.txt"])
def test_a_vocabulary_of_another_library_is_named_with_what_converts_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")

    with pytest.raises(ModelError, match=rf"{name} is not read: AutoTokenizer.* writes a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_loading_needs_neither_torch_nor_transformers(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from brlite.tokenizer import load_tokenizer;"
        f"load_tokenizer(Path({str(folder)!r})).encode('hi');"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


FLAGS = [{}, {"rstrip": True}, {"lstrip": True}, {"single_word": True}, {"normalized": True}]
PLACES = ("tokenizer_config role", "added_tokens_decoder", "tokenizer.json, named by text")
ROLES = ("eos_token", "pad_token", "additional_special_tokens")
# Each flag in each place, and each role there with some of them.
CASES = [(PLACES[at], ROLES[(at + each) % 3], flags) for at in range(3) for each, flags in enumerate(FLAGS)]


@pytest.mark.parametrize(("place", "role", "flags"), CASES)
def test_the_flags_of_an_added_token_are_those_of_transformers(
    qwen2_folder: Path, tmp_path: Path, flags: dict[str, bool], place: str, role: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = Path(shutil.copytree(qwen2_folder, tmp_path / "model"))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    token = {"content": "<|new|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}
    if place == "tokenizer.json, named by text":
        backend.add_special_tokens([AddedToken(**token, special=True)])
    else:
        backend.add_special_tokens([AddedToken("<|new|>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    named: object = token | {"__type": "AddedToken"} if place == "tokenizer_config role" else "<|new|>"
    decoder = {"added_tokens_decoder": {str(backend.token_to_id("<|new|>")): token | {"special": True}}}
    edit(
        folder / "tokenizer_config.json",
        **{role: [named] if role == "additional_special_tokens" else named},
        **(decoder if place == "added_tokens_decoder" else {}),
    )
    texts = ["a <|new|> b", "a<|new|>b", "<|new|>  ", "x\n<|new|>\ny", "é<|new|>e\u0301"]

    tokenizer, reference = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)

    assert [tokenizer.encode(text) for text in texts] == [reference.encode(text) for text in texts]


def test_other_threads_run_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer, text = load_tokenizer(tmp_path), "".join(TEXTS) * 500
    encoding = threading.Thread(target=tokenizer.encode, args=(text,))
    num_turns = 0

    encoding.start()
    while encoding.is_alive():
        num_turns += 1
        time.sleep(0.001)

    assert tokenizer.encodes_in_process
    assert num_turns > 10  # up to 3 if `encode` keeps the GIL


def test_a_long_text_has_the_ids_of_the_library(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    text = "".join(TEXTS) * 20
    expected = Backend.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids

    assert len(text) > LONG_TEXT
    assert load_tokenizer(tmp_path).encode(text) == expected


@pytest.mark.parametrize(
    ("whole", "bare", "expected"),
    [
        ([1, 7, 8, 2], [7, 8], ([1], [2])),
        ([7, 8], [7, 8], ([], [])),
        ([1, 2], [], ([1], [2])),  # a vocabulary that lacks the text
        ([], [], ([], [])),
        ([1, 9, 2], [7], ([], [])),
    ],
)
def test_the_ids_around_a_text_are_found(whole: list[int], bare: list[int], expected: object) -> None:
    assert ids_around(lambda adds: whole if adds else bare) == expected

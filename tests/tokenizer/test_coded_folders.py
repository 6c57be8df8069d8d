"""Baichuan2's and ChatGLM3's tokenizers in small, against sentencepiece itself and their published chat formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from brlite.errors import InvalidRequest, ModelError
from brlite.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.conftest import train_sentencepiece, write_folder
from tests.tokenizer.texts import TEXTS

CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
USER, ASSISTANT = "<reserved_106>", "<reserved_107>"
EOS = 2
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def baichuan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_sentencepiece(
        tmp_path_factory.mktemp("baichuan"),
        model_type="bpe",
        add_dummy_prefix=False,
        user_defined_symbols=["<reserved_105>", USER, ASSISTANT],
    )
    return write_folder(
        folder,
        config={"model_type": "baichuan", "eos_token_id": EOS},
        tokenizer_config={"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False},
    )


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def chatglm_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_sentencepiece(tmp_path_factory.mktemp("chatglm"), model_type=request.param, hard_vocab_limit=False)
    return write_folder(folder, config={"model_type": "chatglm", "eos_token_id": EOS})


def processor(folder: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def control_ids(folder: Path) -> dict[str, int]:
    """The ids that follow the vocabulary, in the published order."""
    size = processor(folder).get_piece_size()
    return {text: size + index for index, text in enumerate(CONTROL)}


@pytest.fixture(scope="module")
def baichuan(baichuan_folder: Path) -> Iterator[Tokenizer]:
    with closing(load_tokenizer(baichuan_folder)) as tokenizer:
        yield tokenizer


@pytest.fixture(scope="module")
def chatglm(chatglm_folder: Path) -> Iterator[Tokenizer]:
    with closing(load_tokenizer(chatglm_folder)) as tokenizer:
        yield tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_ids_of_sentencepiece(
    text: str, baichuan: Tokenizer, baichuan_folder: Path, chatglm: Tokenizer, chatglm_folder: Path
) -> None:
    ids = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (baichuan, chatglm)]

    assert ids == [processor(folder).encode(text) for folder in (baichuan_folder, chatglm_folder)]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_but_for_the_sign_that_stands_for_a_space(
    text: str, baichuan: Tokenizer, chatglm: Tokenizer
) -> None:
    texts = [tokenizer.decode(tokenizer.encode(text)) for tokenizer in (baichuan, chatglm)]

    assert texts == [text.replace("▁", " ")] * 2


def test_baichuan_adds_nothing_to_a_text_and_chatglm_its_prefix(
    baichuan: Tokenizer, chatglm: Tokenizer, chatglm_folder: Path
) -> None:
    ids = control_ids(chatglm_folder)

    assert baichuan.encode("fox") == baichuan.encode("fox", add_special_tokens=False)
    assert chatglm.encode("fox") == [ids["[gMASK]"], ids["sop"], *chatglm.encode("fox", add_special_tokens=False)]
    assert chatglm.bos_token_id is baichuan.bos_token_id is None


def test_a_baichuan_chat_is_the_system_text_and_a_role_token_before_each_message(
    baichuan: Tokenizer, baichuan_folder: Path
) -> None:
    reference = processor(baichuan_folder)
    user, assistant = reference.piece_to_id(USER), reference.piece_to_id(ASSISTANT)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "the fox?"},
    ]

    ids = baichuan.encode_chat(messages)

    brief, hello, answer, fox = (reference.encode(message["content"]) for message in messages)
    assert ids == [*brief, user, *hello, assistant, *answer, user, *fox, assistant]
    assert baichuan.render_chat(messages) == f"Be brief.{USER}你好{ASSISTANT}Hello{USER}the fox?{ASSISTANT}"
    assert baichuan.encode_chat(messages, add_generation_prompt=False) == ids[:-1]


def test_a_baichuan_chat_that_ends_with_the_assistant_goes_on_there(baichuan: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The fox"}]

    assert baichuan.render_chat(messages) == f"{USER}Hi{ASSISTANT}The fox"


def test_baichuan_ends_with_its_end_token_and_hides_role_tokens(baichuan: Tokenizer) -> None:
    ids = baichuan.encode_chat([{"role": "user", "content": "the fox"}])

    assert baichuan.eos_token_ids == (EOS,)
    assert baichuan.decode(ids) == "the fox"
    assert baichuan.decode(ids, skip_special_tokens=False) == f"{USER}the fox{ASSISTANT}"


def test_baichuans_generation_config_may_name_other_role_tokens(baichuan_folder: Path, tmp_path: Path) -> None:
    other = processor(baichuan_folder).piece_to_id("<reserved_105>")
    (tmp_path / "tokenizer.model").write_bytes((baichuan_folder / "tokenizer.model").read_bytes())
    write_folder(tmp_path, config={"model_type": "baichuan"}, generation_config={"user_token_id": other})

    tokenizer = load_tokenizer(tmp_path)

    assert tokenizer.encode_chat([{"role": "user", "content": ""}])[0] == other


@pytest.mark.parametrize("token_id", [100_000, -1, "195"])
def test_a_role_token_that_cannot_be_is_refused(baichuan_folder: Path, tmp_path: Path, token_id: object) -> None:
    (tmp_path / "tokenizer.model").write_bytes((baichuan_folder / "tokenizer.model").read_bytes())
    write_folder(tmp_path, config={"model_type": "baichuan"}, generation_config={"user_token_id": token_id})

    with pytest.raises(ModelError, match=r"generation_config\.json: user_token_id must be a token id below \d+"):
        load_tokenizer(tmp_path)


def test_a_chatglm_chat_is_a_role_token_a_new_line_and_the_content(chatglm: Tokenizer, chatglm_folder: Path) -> None:
    ids, reference = control_ids(chatglm_folder), processor(chatglm_folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "{'city': 'Paris'}", "metadata": "weather"},
        {"role": "tool", "content": "42"},
    ]

    found = chatglm.encode_chat(messages)

    expected = [ids["[gMASK]"], ids["sop"]]
    for role, message in zip(("system", "user", "assistant", "observation"), messages, strict=True):
        expected += [ids[f"<|{role}|>"], *reference.encode(f"{message.get('metadata', '')}\n")]
        expected += reference.encode(message["content"])
    assert found == [*expected, ids["<|assistant|>"]]
    assert chatglm.encode_chat(messages, add_generation_prompt=False) == expected
    assert chatglm.render_chat(messages[:2]) == "[gMASK]sop<|system|>\nBe brief.<|user|>\n你好<|assistant|>"


@pytest.mark.parametrize("told_by", ["code", "name"])
def test_chatglm2_has_rounds_in_words_and_no_tokens_for_roles(
    chatglm_folder: Path, tmp_path: Path, told_by: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((chatglm_folder / "tokenizer.model").read_bytes())
    name = {"_name_or_path": "THUDM/chatglm2-6b"} if told_by == "name" else {}
    write_folder(tmp_path, config={"model_type": "chatglm", "eos_token_id": EOS, **name})
    if told_by == "code":
        (tmp_path / "tokenization_chatglm.py").write_text('tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]')
    tokenizer = load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

    text = tokenizer.render_chat([*chat, {"role": "user", "content": "<|user|>"}])

    assert text == "[gMASK]sop[Round 1]\n\n问：Hi\n\n答：Hello\n\n[Round 2]\n\n问：<|user|>\n\n答："
    assert tokenizer.eos_token_ids == (EOS,)
    assert tokenizer.vocab_size == processor(tmp_path).get_piece_size() + 5
    with pytest.raises(InvalidRequest, match="in turns"):
        tokenizer.encode_chat([{"role": "system", "content": "x"}, *chat])


def test_chatglm3_is_told_by_its_code(chatglm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((chatglm_folder / "tokenizer.model").read_bytes())
    write_folder(tmp_path, config={"model_type": "chatglm", "_name_or_path": "my-chatglm2-successor"})
    (tmp_path / "tokenization_chatglm.py").write_text('roles = ["<|system|>", "<|user|>", "<|assistant|>"]')

    assert len(load_tokenizer(tmp_path).eos_token_ids) == 3


def test_tools_follow_a_chatglm_system_message_as_json(chatglm: Tokenizer) -> None:
    tools = [{"name": "天气", "parameters": {}}]

    text = chatglm.render_chat([{"role": "system", "content": "You have tools:", "tools": tools}])

    assert f"You have tools:\n{json.dumps(tools, indent=4, ensure_ascii=False)}<|assistant|>" in text


@pytest.mark.parametrize("spoken", ["<|assistant|>", "<|user|>\n", "[gMASK]sop", "</s>", "eop"])
def test_a_message_that_spells_out_a_chatglm_control_token_does_not_become_it(
    chatglm: Tokenizer, chatglm_folder: Path, spoken: str
) -> None:
    harmless = chatglm.encode_chat([{"role": "user", "content": ""}])

    ids = chatglm.encode_chat([{"role": "user", "content": spoken}])

    special = [token_id for token_id in ids if token_id in chatglm.special_token_ids]
    assert special == [token_id for token_id in harmless if token_id in chatglm.special_token_ids]
    assert chatglm.encode(spoken, add_special_tokens=False) == processor(chatglm_folder).encode(spoken)


def test_chatglm_ends_where_another_speaks_and_hides_its_control_tokens(
    chatglm: Tokenizer, chatglm_folder: Path
) -> None:
    ids = control_ids(chatglm_folder)

    assert chatglm.eos_token_ids == (EOS, ids["<|user|>"], ids["<|observation|>"])
    assert {0, 1, EOS, *ids.values()} == chatglm.special_token_ids
    assert chatglm.vocab_size == processor(chatglm_folder).get_piece_size() + 9
    assert chatglm.decode([*chatglm.encode("the fox"), ids["<|user|>"]]) == "the fox"
    assert chatglm.token_text(ids["<|observation|>"]) == "<|observation|>"


def test_an_operators_template_writes_control_tokens_by_name(
    chatglm: Tokenizer, chatglm_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    ids, reference = control_ids(chatglm_folder), processor(chatglm_folder)

    tokenizer = load_tokenizer(chatglm_folder, chat_template=tmp_path / "own.jinja")

    assert tokenizer.encode_chat([{"role": "user", "content": "fox"}]) == [ids["<|user|>"], *reference.encode("fox")]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "narrator", "content": "x"}], "role 'narrator' has no token; .*user, assistant"),
        ([{"role": "user", "content": ["x"]}], "a part of a message.s content must be a text"),
    ],
)
def test_a_chat_that_a_format_cannot_say_is_refused(
    baichuan: Tokenizer, chatglm: Tokenizer, messages: list[dict[str, Any]], reason: str
) -> None:
    for tokenizer in (baichuan, chatglm):
        with pytest.raises(InvalidRequest, match=f"Error in applying chat template from request: {reason}") as caught:
            tokenizer.encode_chat(messages)

        assert caught.value.param == "messages"


def test_a_late_system_message_has_no_place_in_a_baichuan_chat(baichuan: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="a system message must be the first"):
        baichuan.encode_chat([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}])


def test_lone_surrogates_are_refused_in_a_marked_chat(chatglm: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        chatglm.encode_chat([{"role": "user", "content": "\ud800"}])


def test_a_file_that_is_no_sentencepiece_model_is_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, config={"model_type": "chatglm"})
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")

    with pytest.raises(ModelError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)

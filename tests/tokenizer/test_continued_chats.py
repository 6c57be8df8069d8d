"""Chats whose last message the model is to go on with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from brlite.backends.plugins.toy_text import ToyChat
from brlite.chat.control_tokens import MarkedText, cut_before_last
from brlite.errors import InvalidRequest
from brlite.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.conftest import write_folder

QUESTION = {"role": "user", "content": "Name a colour. END"}


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[Tokenizer]:
    with closing(load_tokenizer(smollm2_path)) as tokenizer:
        yield tokenizer


@pytest.mark.model
@pytest.mark.parametrize("content", ["The colour is", "The colour is ", "", "夏天 😀", "<|im_end|>"])
def test_the_text_ends_where_the_last_message_does(smollm2: Tokenizer, content: str) -> None:
    chat = [QUESTION, {"role": "assistant", "content": content}]

    text = smollm2.render_chat(chat, continue_final_message=True)
    token_ids = smollm2.encode(text, add_special_tokens=False)

    assert text == smollm2.render_chat([QUESTION]) + content
    assert smollm2.decode(token_ids, skip_special_tokens=False) == text
    whole = smollm2.render_chat(chat, add_generation_prompt=False)
    assert whole == text + "<|im_end|>\n"


def test_marked_tokens_before_the_end_stay_tokens() -> None:
    chat = [{"role": "user", "content": "aENDb"}, {"role": "assistant", "content": "cEND"}]
    text = ToyChat().render(chat, add_generation_prompt=False)

    cut = cut_before_last(text, "END")

    assert isinstance(cut, MarkedText)
    assert cut.parts == (*text.parts[:3], "c")
    assert cut_before_last(MarkedText(["x"], {}), "END") is None
    assert cut_before_last("x", "END") is None


ALL_BUT_THE_LAST = "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}"


def test_a_template_that_leaves_the_last_message_out_cannot_be_continued(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "model")
    folder = write_folder(tmp_path / "model", tokenizer_config={"chat_template": ALL_BUT_THE_LAST})

    with (
        closing(load_tokenizer(folder)) as tokenizer,
        pytest.raises(InvalidRequest, match="the chat template does not end with the last message") as caught,
    ):
        tokenizer.render_chat([QUESTION, {"role": "assistant", "content": "x"}], continue_final_message=True)

    assert caught.value.param == "continue_final_message"

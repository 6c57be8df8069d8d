"""The vocabularies of the tokenizer's tests serve here too. A template's process serves all tests of a file."""

from collections.abc import Iterator
from functools import cache

import pytest

from brlite.chat.template import ChatTemplate
from tests.tokenizer.conftest import *  # noqa: F403


@cache
def compiled(template: str) -> ChatTemplate:
    return ChatTemplate(template, source="here", special_tokens={"bos_token": "<s>"})


@pytest.fixture(scope="module", autouse=True)
def _templates_end_with_their_file() -> Iterator[None]:
    yield
    compiled.cache_clear()

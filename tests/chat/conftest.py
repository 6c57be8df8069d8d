"""The vocabularies of the tokenizer's tests serve here too."""

from tests.tokenizer.conftest import *  # noqa: F403

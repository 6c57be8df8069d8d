"""Fill-in-the-middle tokens: finds them in a vocabulary by their published names, and builds prompts with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

# The tokens before the prefix, the suffix and the answer. None: no token, the answer directly continues the prefix.
_NAMES: tuple[tuple[str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, Granite 4
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM-4
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("[PREFIX]", "[SUFFIX]", None),  # Codestral
)
# Before the name of a repository, and before the name of each of its files.
_REPOSITORIES = ("<|repo_name|>", "<repo_name>", "<reponame>")
_FILES = ("<|file_sep|>", "<file_sep>", "<filename>")
# Tokens that end an infill, besides the end of text: Code Llama's end, padding, and those that begin another file.
_ENDS = ("▁<EOT>", "<|fim_pad|>", "<fim_pad>", "<|file_separator|>", *_FILES, *_REPOSITORIES)
# llama.cpp's placeholders: a client names neither the repository nor the file that is filled in.
_REPOSITORY_NAME, _FILE_NAME = "myproject\n", "filename\n"
_SNIPPET = "\n\n--- snippet ---\n\n"


class InfillText(NamedTuple):
    """The text before and after a gap, the start of the answer, and names and texts of other files."""

    before: str
    after: str
    start: str = ""
    files: Sequence[tuple[str, str]] = ()


class InfillTokens(NamedTuple):
    """Ids of tokens. Without `middle` the suffix comes first. An infill ends at any of `ends`, too.

    `repository` stands before the name of a repository, `file` before that of each file; None: there is no such token.
    """

    prefix: int
    suffix: int
    middle: int | None
    ends: tuple[int, ...] = ()
    repository: int | None = None
    file: int | None = None

    def prompt(self, before: list[int], after: list[int]) -> list[int]:
        """The prompt for the gap between two texts, which are given as token ids."""
        if self.middle is None:
            return [self.suffix, *after, self.prefix, *before]
        return [self.prefix, *before, self.suffix, *after, self.middle]

    def context(self, files: Sequence[tuple[str, str]], encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of the names and texts of other files, which go before the prompt.

        Without a `file` token, only the texts, one after the other, each below a line that says "snippet".
        """
        if self.file is None:
            return encode("".join(f"{_SNIPPET}{text}" for _, text in files))
        token_ids = [] if self.repository is None else [self.repository, *encode(_REPOSITORY_NAME)]
        for name, text in files:
            token_ids += [self.file, *encode(f"{name}\n{text}")]
        return [*token_ids, self.file, *encode(_FILE_NAME)]


def find_infill_tokens(
    token_id: Callable[[str], int | None], named: Sequence[int | None] = (None, None, None, None, None)
) -> InfillTokens | None:
    """The tokens of a vocabulary; None if it has none. `token_id` gives the id of a token's text.

    `named` are the ids that the model's file gives: prefix, suffix, middle, repository, file.
    """
    ends = tuple(found for text in _ENDS if (found := token_id(text)) is not None)
    prefix, suffix, middle, repository, file = named
    if repository is None:
        repository = next((found for text in _REPOSITORIES if (found := token_id(text)) is not None), None)
    if file is None:
        file = next((found for text in _FILES if (found := token_id(text)) is not None), None)
    if prefix is not None and suffix is not None and middle is not None:
        return InfillTokens(prefix, suffix, middle, ends, repository, file)
    for names in _NAMES:
        prefix, suffix, middle = (None if name is None else token_id(name) for name in names)
        if prefix is not None and suffix is not None and (middle is not None or names[2] is None):
            return InfillTokens(prefix, suffix, middle, ends, repository, file)
    return None

"""The tokens by which a model fills in what stands between two texts, by the names that vocabularies give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# Before the text, before what follows it, and before the answer; None: the answer goes on with the text before it.
_NAMES: tuple[tuple[str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, Granite 4
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM-4
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("[PREFIX]", "[SUFFIX]", None),  # Codestral
)
# What ends an infill beside the end of text: Code Llama's end, padding, and what begins another file.
_ENDS = ("▁<EOT>", "<|fim_pad|>", "<fim_pad>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>", "<file_sep>")


class InfillTokens(NamedTuple):
    """Ids of tokens. Without `middle` the suffix stands first. An infill ends at any of `ends`, too."""

    prefix: int
    suffix: int
    middle: int | None
    ends: tuple[int, ...] = ()

    def prompt(self, before: list[int], after: list[int]) -> list[int]:
        """The prompt for what stands between two texts, given as token ids."""
        if self.middle is None:
            return [self.suffix, *after, self.prefix, *before]
        return [self.prefix, *before, self.suffix, *after, self.middle]


def find_infill_tokens(
    token_id: Callable[[str], int | None], named: tuple[int | None, int | None, int | None] = (None, None, None)
) -> InfillTokens | None:
    """Those of a vocabulary, which gives the id of a text. `named` are those that the model's file names itself."""
    ends = tuple(found for text in _ENDS if (found := token_id(text)) is not None)
    prefix, suffix, middle = named
    if prefix is not None and suffix is not None and middle is not None:
        return InfillTokens(prefix, suffix, middle, ends)
    for names in _NAMES:
        prefix, suffix, middle = (None if name is None else token_id(name) for name in names)
        if prefix is not None and suffix is not None and (middle is not None or names[2] is None):
            return InfillTokens(prefix, suffix, middle, ends)
    return None

"""A text in which some tokens are marked as such, so that the same words elsewhere in it stay words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class MarkedText(str):
    """A rendered chat for people to read, and in `parts` the same for the tokenizer: token ids, and texts that are
    encoded each by itself."""

    parts: tuple[str | int, ...]

    def __new__(cls, parts: Iterable[str | int], names: Mapping[int, str]) -> MarkedText:
        """`names` are what marked tokens read as."""
        kept = tuple(parts)
        text = super().__new__(cls, "".join(part if isinstance(part, str) else names[part] for part in kept))
        text.parts = kept
        return text

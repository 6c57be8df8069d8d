"""A text in which some tokens are marked as such, so that the same words elsewhere in it stay words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class MarkedText(str):
    """A rendered chat for people to read, and in `parts` the same for the tokenizer: token ids, and texts that are
    encoded each by itself."""

    parts: tuple[str | int, ...]
    _names: Mapping[int, str]

    def __new__(cls, parts: Iterable[str | int], names: Mapping[int, str]) -> MarkedText:
        """`names` are what marked tokens read as."""
        kept = tuple(parts)
        text = super().__new__(cls, "".join(part if isinstance(part, str) else names[part] for part in kept))
        text.parts = kept
        text._names = names
        return text

    def cut(self, num_parts: int, last: str) -> MarkedText:
        """The first parts, and another last one."""
        return MarkedText((*self.parts[:num_parts], last), self._names)


def cut_before_last(text: str, end: str) -> str | None:
    """The text up to where `end` stands last, marked if it was. None if `end` does not stand in it."""
    if not isinstance(text, MarkedText):
        before, found, _ = text.rpartition(end)
        return before if found else None
    for index in reversed(range(len(text.parts))):
        part = text.parts[index]
        if isinstance(part, str) and end in part:
            return text.cut(index, part.rpartition(end)[0])
    return None

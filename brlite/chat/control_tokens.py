"""The control tokens of a vocabulary, and those in a rendered chat. Only its template can write control tokens.

In a `MarkedText`, the text of a control token inside a message stays plain text. Renders and encodes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import tokenizers

# Tokens of this shape mark roles and turns, even if they are not flagged as special, such as DeepSeek's roles.
_CONTROL_SHAPE = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
MAX_DEPTH = 24  # of the branches in a pattern of control tokens


class MarkedText(str):
    """A rendered chat. As a string it is readable; `parts` are for the tokenizer: token ids, and texts to encode
    separately."""

    parts: tuple[str | int, ...]
    _names: Mapping[int, str]

    def __new__(cls, parts: Iterable[str | int], names: Mapping[int, str]) -> MarkedText:
        """`names` maps the token ids in the parts to their texts."""
        kept = tuple(parts)
        text = super().__new__(cls, "".join(part if isinstance(part, str) else names[part] for part in kept))
        text.parts = kept
        text._names = names
        return text

    def cut(self, num_parts: int, last: str) -> MarkedText:
        """The first `num_parts` parts, followed by `last`."""
        return MarkedText((*self.parts[:num_parts], last), self._names)


def cut_before_last(text: str, end: str) -> str | None:
    """The text before the last `end`, of the same type as `text`. None if there is no `end`."""
    if not isinstance(text, MarkedText):
        before, found, _ = text.rpartition(end)
        return before if found else None
    for index in reversed(range(len(text.parts))):
        part = text.parts[index]
        if isinstance(part, str) and end in part:
            return text.cut(index, part.rpartition(end)[0])
    return None


class ControlToken(NamedTuple):
    """With `lstrip` or `rstrip` the token includes the white space on that side. With `single_word` it is not found
    inside words."""

    token_id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class ControlTokens:
    """Control tokens by their texts. With `are_written_by_id` the encoder does not find them in a text, so all must be
    given as ids."""

    def __init__(self, tokens: Mapping[str, ControlToken], *, are_written_by_id: bool = False) -> None:
        self.texts = sorted(text for text in tokens if text)
        self.pattern = pattern_of(self.texts)  # "" without control tokens
        self._tokens = tokens
        self._names = {token.token_id: text for text, token in tokens.items()}
        self._are_written_by_id = are_written_by_id
        self._pattern = re.compile(self.pattern or r"(?!)")

    def find(self, text: str, mark: str | None) -> str:
        """The rendered chat for the tokenizer: a `MarkedText` if control tokens must be separated from plain text, else
        `text` unchanged.

        `mark` follows the first character of a control token's text that begins in a message and stays plain text.
        """
        if mark is None and not self._are_written_by_id:
            return text
        return MarkedText(self._parts(text, mark or ""), self._names)

    def split(self, text: str) -> Iterator[str | int]:
        """The ids of the control tokens in a text, and the texts between them."""
        return self._parts(text, "")

    def _parts(self, text: str, mark: str) -> Iterator[str | int]:
        end = 0
        for match in self._pattern.finditer(text):
            token = self._tokens[match[0]]
            if mark and text.startswith(mark, match.start() + 1):
                continue
            if token.single_word and (_is_word(text, match.start() - 1) or _is_word(text, match.end())):
                continue
            words = text[end : match.start()].replace(mark, "") if mark else text[end : match.start()]
            yield words.rstrip() if token.lstrip else words
            yield token.token_id
            end = match.end()
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
        yield text[end:].replace(mark, "") if mark else text[end:]


def pattern_of(texts: Sequence[str], depth: int = MAX_DEPTH) -> str:
    """A regular expression for the longest of these texts at a place; "" without texts.

    It branches by characters. A list of a thousand texts is tried in whole at each `<` of a message: 15 s for 1 MB.
    """
    start = commonprefix(texts)  # noqa: RUF071  # of characters, not of folders
    ends = sorted({text[len(start) :] for text in texts})
    rests = [end for end in ends if end]
    if not rests:
        return re.escape(start)
    if depth:
        branches = [pattern_of([*group], depth - 1) for _, group in groupby(rests, key=itemgetter(0))]
    else:
        branches = [re.escape(rest) for rest in sorted(rests, key=len, reverse=True)]
    return f"{re.escape(start)}(?:{'|'.join(branches)}){'?' if len(rests) < len(ends) else ''}"


def read_control_tokens(backend: tokenizers.Tokenizer) -> ControlTokens:
    """The control tokens of a tokenizer of the `tokenizers` package. It finds them in texts by itself."""
    return ControlTokens(
        {
            added.content: ControlToken(token_id, added.lstrip, added.rstrip, added.single_word)
            for token_id, added in backend.get_added_tokens_decoder().items()
            if is_control(added)
        }
    )


def is_control(token: tokenizers.AddedToken) -> bool:
    return token.special or _CONTROL_SHAPE.fullmatch(token.content) is not None


def _is_word(text: str, index: int) -> bool:
    return 0 <= index < len(text) and (text[index].isalnum() or text[index] == "_")

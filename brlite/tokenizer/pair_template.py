"""The prompt of a model that scores a pair of texts: a fixed text with places for an instruction, a query, a document.

Only the template can write control tokens: those that these texts spell out stay text, as in a chat.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from brlite.chat.control_tokens import ControlToken, ControlTokens, MarkedText
from brlite.errors import ConfigError
from brlite.files.quoting import MAX_EXCERPT, one_line
from brlite.files.text_file import TextError, read_text
from brlite.tokenizer.tokenizer import Tokenizer

NOT_FILES = ("auto", "qwen3_reranker", "model", "none")  # values of `score_template` that are no path
_PLACES = re.compile(r"\{(query|document|instruction(?:=[^{}]*)?)\}")
# From the model card of Qwen3-Reranker. Its tokenizer has <think> and </think> as words of their own.
QWEN3_RERANKER = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction=Given a web search query, retrieve relevant passages that answer the query}\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
# llama.cpp's conversion writes the same template with the default instruction as part of the text.
_WITHOUT_INSTRUCTION = {re.sub(r"\{instruction=([^{}]*)\}", r"\1", QWEN3_RERANKER): QWEN3_RERANKER}
_ROLES = re.compile(r"<[|｜][^|｜]+[|｜]>")  # tokens of this shape are control tokens, flagged as special or not


class _Place(NamedTuple):
    """Where a text goes: "query" or "instruction"; `default` stands there if a request gives none."""

    name: str
    default: str


class PairTemplate:
    """A text with `{query}` and, behind it, `{document}`, split at the control tokens of a vocabulary.

    Before `{document}` it may have `{instruction}`, or with a default `{instruction=…}`. Then `takes_instruction`.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, *, source: str) -> None:
        """Raises `ConfigError`, naming `source`, for wrong places, or for a control token that is not known."""
        *texts, after = _PLACES.split(text)
        places = [_Place(name, default) for name, _, default in (place.partition("=") for place in texts[1::2])]
        names = [place.name for place in places]
        if names not in (
            ["query", "document"],
            ["instruction", "query", "document"],
            ["query", "instruction", "document"],
        ):
            raise ConfigError(
                f"score_template {source}: it must hold {{query}} and then {{document}}, each once, and may hold "
                "{instruction} or {instruction=DEFAULT} before {document}"
            )
        self.takes_instruction = "instruction" in names
        ids = {tokenizer.token_text(token_id): token_id for token_id in tokenizer.special_token_ids}
        for name in _ROLES.findall(text):
            if name in ids:
                continue
            encoded = tokenizer.encode(name, add_special_tokens=False)
            if len(encoded) != 1:
                reason = f"{one_line(name, MAX_EXCERPT)} is no token of the model; set score_template to none or a file"
                raise ConfigError(f"score_template {source}: {reason}")
            ids[name] = encoded[0]
        controls = ControlTokens({name: ControlToken(token_id) for name, token_id in ids.items()})
        self._before: list[str | int | _Place] = []
        for part, place in zip(texts[::2], places, strict=True):
            self._before += [*controls.split(part), place]
        del self._before[-1]  # the document's place
        self._after = tuple(controls.split(after))
        self._names = {token_id: name for name, token_id in ids.items()}

    def fill(self, query: str, document: str, instruction: str | None = None) -> MarkedText:
        """The prompt of a pair, for `Tokenizer.encode`. Without an `instruction` it has the template's default."""
        return self._join(*self._head(query, instruction), document, *self._after)

    def head(self, query: str, instruction: str | None = None) -> MarkedText:
        """The prompt before the document."""
        return self._join(*self._head(query, instruction))

    def tail(self) -> MarkedText:
        """The prompt behind the document."""
        return self._join(*self._after)

    def _head(self, query: str, instruction: str | None) -> list[str | int]:
        given = {"query": query, "instruction": instruction}
        return [
            part if not isinstance(part, _Place) else part.default if (text := given[part.name]) is None else text
            for part in self._before
        ]

    def _join(self, *parts: str | int) -> MarkedText:
        """The parts, with neighbouring texts joined: a token may span the border between a text and the template."""
        joined: list[str | int] = []
        for part in parts:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                part = f"{joined.pop()}{part}"
            joined.append(part)
        return MarkedText(joined, self._names)


def read_pair_template(source: str, tokenizer: Tokenizer, own: object = None) -> PairTemplate | None:
    """The template for `source`: "qwen3_reranker", "none", "model" (its files' `own`), or the path of a file.

    Raises `ConfigError`.
    """
    if source == "none":
        return None
    if source == "qwen3_reranker":
        return PairTemplate(QWEN3_RERANKER, tokenizer, source=source)
    if source == "model":
        if not isinstance(own, str):
            raise ConfigError("score_template model: the model's files have no template of a pair")
        return PairTemplate(_WITHOUT_INSTRUCTION.get(own, own), tokenizer, source=source)
    return PairTemplate(read_pair_file(source), tokenizer, source=source)


def read_pair_file(source: str) -> str:
    """The text of the operator's template file. Raises `ConfigError`."""
    try:
        return read_text(Path(source))
    except TextError as error:
        raise ConfigError(f"score_template {source}: {error}") from None

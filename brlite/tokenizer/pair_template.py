"""The prompt of a model that scores a pair of texts: a fixed text with places for a query and a document.

Only the template can write control tokens: those that a query or a document spells out stay text, as in a chat.
"""

from __future__ import annotations

import re
from pathlib import Path

from brlite.chat.control_tokens import ControlToken, ControlTokens, MarkedText
from brlite.errors import ConfigError
from brlite.files.text_file import TextError, read_text
from brlite.tokenizer.tokenizer import Tokenizer

# From the model card of Qwen3-Reranker. Its tokenizer has <think> and </think> as words of their own.
QWEN3_RERANKER = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_PLACES = re.compile(r"\{(query|document)\}")
_ROLES = re.compile(r"<[|｜][^|｜]+[|｜]>")  # tokens of this shape are control tokens, flagged as special or not


class PairTemplate:
    """A text with `{query}` and, behind it, `{document}`, split at the control tokens of a vocabulary."""

    def __init__(self, text: str, tokenizer: Tokenizer, *, source: str) -> None:
        """Raises `ConfigError`, naming `source`, without these two places, or for a control token that is not known."""
        if _PLACES.findall(text) != ["query", "document"]:
            raise ConfigError(f"score_template {source}: it must hold {{query}} and then {{document}}, each once")
        ids = {tokenizer.token_text(token_id): token_id for token_id in tokenizer.special_token_ids}
        for name in set(_ROLES.findall(text)) - ids.keys():
            encoded = tokenizer.encode(name, add_special_tokens=False)
            if len(encoded) != 1:
                reason = f"{name} is no token of the model; set score_template to none or a file"
                raise ConfigError(f"score_template {source}: {reason}")
            ids[name] = encoded[0]
        controls = ControlTokens({name: ControlToken(token_id) for name, token_id in ids.items()})
        before, _, between, _, after = _PLACES.split(text)
        self._before, self._between, self._after = (tuple(controls.split(part)) for part in (before, between, after))
        self._names = {token_id: name for name, token_id in ids.items()}

    def fill(self, query: str, document: str) -> MarkedText:
        """The prompt of a pair, for `Tokenizer.encode`."""
        return self._join(*self._before, query, *self._between, document, *self._after)

    def head(self, query: str) -> MarkedText:
        """The prompt before the document."""
        return self._join(*self._before, query, *self._between)

    def tail(self) -> MarkedText:
        """The prompt behind the document."""
        return self._join(*self._after)

    def _join(self, *parts: str | int) -> MarkedText:
        """The parts, with neighbouring texts joined: a token may span the border between a text and the template."""
        joined: list[str | int] = []
        for part in parts:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                part = f"{joined.pop()}{part}"
            joined.append(part)
        return MarkedText(joined, self._names)


def read_pair_template(source: str, tokenizer: Tokenizer) -> PairTemplate | None:
    """The template for `source`: "qwen3_reranker", "none", or the path of a file. Raises `ConfigError`."""
    if source == "none":
        return None
    if source == "qwen3_reranker":
        return PairTemplate(QWEN3_RERANKER, tokenizer, source=source)
    try:
        return PairTemplate(read_text(Path(source)), tokenizer, source=source)
    except TextError as error:
        raise ConfigError(f"score_template {source}: {error}") from None

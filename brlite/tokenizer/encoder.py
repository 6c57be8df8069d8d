"""Encodes text as token ids with Hugging Face's `tokenizers`, here or in a child process (`encoder_worker.py`).

A text that makes a third party's tokenizer hang, abort or exhaust memory is refused by the child process. A panic of
`tokenizers` here is a `BaseException` in Python; it becomes an `InvalidRequest` for the text that caused it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from brlite.chat.control_tokens import is_control
from brlite.errors import InvalidRequest, ModelError
from brlite.files.quoting import one_line, reason
from brlite.process.sandbox import ChildLimits, ChildProcess
from brlite.tokenizer.tokenizer import LONG_TEXT, Encoder

_ALL, _WORDS, _LATER_WORDS = range(3)
_TABLE_GROWTH = 32  # the most bytes that a library's tables take for each byte of their file
_MAX_COMPOSED = 4  # the most characters that Unicode normalization composes into one


class BackendEncoder(Encoder):
    """An `Encoder` with three tokenizers of the `tokenizers` package.

    One knows all tokens. One has no control tokens. One has none either, and puts no space before the first word.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, child_limits: ChildLimits | None = None) -> None:
        """With `child_limits` a child process encodes, so that an endless regular expression can be stopped."""
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._words = _without_control_tokens(backend, backend.pre_tokenizer)
        later_words = _without_control_tokens(backend, _without_first_space(backend.pre_tokenizer))
        self._backends = (backend, self._words, later_words)
        self._process = None
        if child_limits is not None:
            texts = [each.to_str() for each in self._backends]
            self._process = EncoderProcess("tokenizers", {"tokenizers": texts}, sum(map(len, texts)), child_limits)
        self._control_ids = frozenset(token_id for token_id, token in added.items() if is_control(token))
        # Added tokens have other ids in the copies: id there → id in the vocabulary.
        self._renumbered = {
            self._words.token_to_id(token.content): token_id
            for token_id, token in added.items()
            if token_id not in self._control_ids and self._words.token_to_id(token.content) != token_id
        }

    @property
    def max_composed(self) -> int:
        if any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values()):
            return 0  # such a token absorbs all white space beside it
        return 1 if self._backend.normalizer is None else _MAX_COMPOSED

    @property
    def is_in_process(self) -> bool:
        return self._process is None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._encode(_ALL, text, add_special_tokens=add_special_tokens)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()

    def encode_words(self, text: str, *, is_first: bool) -> list[int]:
        ids = self._encode(_WORDS if is_first else _LATER_WORDS, text)
        if self._renumbered:
            ids = [self._renumbered.get(token_id, token_id) for token_id in ids]
        if self._control_ids.isdisjoint(ids):
            return ids
        # The vocabulary has a control token's text as a word, too: the word becomes its characters.
        spelt: list[int] = []
        for token_id in ids:
            if token_id not in self._control_ids:
                spelt.append(token_id)
                continue
            for character in self._backend.id_to_token(token_id) or "":
                parts = self._encode(_LATER_WORDS, character)
                spelt += [part for part in parts if part not in self._control_ids]
        return spelt

    def _encode(self, index: int, text: str, *, add_special_tokens: bool = False) -> list[int]:
        if self._process is None:
            return encode_ids(self._backends[index], text, add_special_tokens=add_special_tokens)
        return self._process.encode(index=index, text=text, add_special_tokens=add_special_tokens)


class EncoderProcess:
    """One child with a tokenizer. Thread-safe; texts are encoded one at a time. `description` is its first answer.

    The memory of `limits` is increased by `_TABLE_GROWTH` times the tokenizer's size.
    """

    def __init__(self, package: str, setup: dict[str, Any], num_bytes: int, limits: ChildLimits) -> None:
        """`setup` holds the tokenizer, `num_bytes` long. Raises `ModelError` if the package cannot read it."""
        limits = limits._replace(memory_bytes=limits.memory_bytes + _TABLE_GROWTH * num_bytes)
        self._child = ChildProcess(Path(__file__).with_name("encoder_worker.py"), (package,), limits)
        self.description = self._child.set_up(setup)
        if "error" in self.description:
            self._child.close()
            raise ModelError(f"the tokenizer cannot be read: {one_line(self.description['error'])}")

    def encode(self, **message: Any) -> list[int]:
        """The ids of a text. Raises `InvalidRequest` if the tokenizer fails on it."""
        answer = self._child.call(message)
        if "error" in answer:
            raise InvalidRequest(f"the model's tokenizer failed on the text: {one_line(answer['error'])}")
        ids: list[int] = answer["ids"]
        return ids

    def close(self) -> None:
        """End the child. May be called twice."""
        self._child.close()


def encode_ids(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text. Raises `InvalidRequest`. Other threads run while a long text is encoded."""
    try:
        if len(text) > LONG_TEXT:
            # `encode` keeps the GIL (tokenizers 0.23): a text of 1 MB would stop all threads for 1.6 s.
            encode_batch = getattr(backend, "encode_batch_fast", backend.encode_batch)
            ids: list[int] = encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        else:
            ids = backend.encode(text, add_special_tokens=add_special_tokens).ids
    except Exception as error:
        raise InvalidRequest(f"the model's tokenizer cannot encode the text: {reason(error)}") from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise InvalidRequest(f"the model's tokenizer failed on the text: {reason(error)}") from None
    return ids


def is_panic(error: BaseException) -> bool:
    """Whether it is a panic of a Rust library. Its class cannot be imported."""
    return type(error).__name__ == "PanicException"


def _without_control_tokens(
    backend: tokenizers.Tokenizer, pre_tokenizer: pre_tokenizers.PreTokenizer | None
) -> tokenizers.Tokenizer:
    """A tokenizer with the same vocabulary, but without the added tokens that are control tokens."""
    words = tokenizers.Tokenizer(backend.model)
    words.normalizer = backend.normalizer
    words.pre_tokenizer = pre_tokenizer
    added = backend.get_added_tokens_decoder()
    words.add_tokens([added[token_id] for token_id in sorted(added) if not is_control(added[token_id])])
    return words


def _without_first_space(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> pre_tokenizers.PreTokenizer | None:
    """The pre-tokenizer without a space before the prompt's first word. Spaces before each part of a text stay."""
    if isinstance(pre_tokenizer, pre_tokenizers.Sequence):
        return pre_tokenizers.Sequence([_without_first_space(step) for step in pre_tokenizer])  # type: ignore[attr-defined]  # it has __getitem__
    if isinstance(pre_tokenizer, pre_tokenizers.Metaspace) and pre_tokenizer.prepend_scheme == "first":
        return pre_tokenizers.Metaspace(
            replacement=pre_tokenizer.replacement, prepend_scheme="never", split=pre_tokenizer.split
        )
    return pre_tokenizer

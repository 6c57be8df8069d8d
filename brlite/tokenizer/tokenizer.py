"""The tokenizer of one model: text to token ids and back, and chats to text. Loaders make it; it reads no files."""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from brlite.chat.control_tokens import MarkedText, cut_before_last
from brlite.chat.turns import NO_EXTRAS, TemplateExtras, joined_text
from brlite.errors import InvalidRequest
from brlite.process.sandbox import ChildLimits

if TYPE_CHECKING:
    from brlite.chat.formats import ChatFormat
    from brlite.tokenizer.infill import InfillText, InfillTokens
    from brlite.tokenizer.token_bytes import TokenBytes


KEPT_TEXTS = 16_384  # of tokens, in 3 MB; a vocabulary's 150,000 would take 25 MB
LONG_TEXT = 4096  # characters: encoding more than this takes over a millisecond


class TokenizerOptions(NamedTuple):
    """How a tokenizer is loaded. `chat_template` is the file that replaces the model's own template.

    `limits` bound a child process that renders a chat or encodes a text: its CPU time for each, and its memory. With
    `control_tokens_in_text` the text of a control token in a message becomes that token.
    """

    chat_template: Path | None
    limits: ChildLimits
    control_tokens_in_text: bool


class SpecialTokenIds(NamedTuple):
    """BOS, the tokens that end a completion, and all control tokens. Repetitions have no meaning."""

    bos: int | None
    eos: Iterable[int]
    control: Iterable[int]


class Encoder(Protocol):
    """Cuts text into token ids. Thread-safe; `encode` releases the GIL for long texts."""

    @property
    def max_composed(self) -> int:
        """The most characters of a text that normalization can compose into one. 0: no limit."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. The text of a control token becomes that token if the tokenizer looks for it."""
        ...

    def encode_words(self, text: str, *, is_first: bool) -> list[int]:
        """Token ids of a text, never control tokens. `is_first`: the text is the beginning of the prompt."""
        ...

    @property
    def is_in_process(self) -> bool:
        """Whether `encode` runs in this process. False if it waits for a child process."""
        return True

    def close(self) -> None:
        """Release resources, such as a child process."""
        return


class Tokenizer:
    """Text to token ids and back. Immutable and thread-safe; `encode` releases the GIL for long texts.

    Ids 0 to `vocab_size` - 1 exist. Each of `eos_token_ids` ends a completion. `special_token_ids` are the control
    tokens, which `decode` skips by default. `chat_format` renders chats; None without a template. `infill` has the
    tokens of a fill-in-the-middle prompt; None for a vocabulary without them.
    """

    def __init__(
        self,
        encoder: Encoder,
        token_bytes: TokenBytes,
        special: SpecialTokenIds,
        chat_format: ChatFormat | None,
        infill: InfillTokens | None = None,
    ) -> None:
        self.vocab_size = len(token_bytes.table)
        self.bos_token_id = special.bos
        self.eos_token_ids = tuple(dict.fromkeys(special.eos))
        self.special_token_ids = frozenset(special.control)
        self._encoder = encoder
        self._bytes = token_bytes.table
        # Gives the text of a token; None if its bytes end inside a character. Most tokens come again and again.
        self.whole_text = lru_cache(KEPT_TEXTS)(partial(_whole_text, token_bytes.table))
        self._strips_first_space = token_bytes.strips_first_space
        self.chat_format = chat_format
        self.infill = infill
        # The most characters of a text that become one token; 0: no limit.
        self._max_characters = max(map(len, self._bytes), default=0) * encoder.max_composed

    @property
    def has_chat_template(self) -> bool:
        return self.chat_format is not None

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str | None = None) -> list[int]:
        """Token ids of a text, with the BOS and EOS that the model's tokenizer adds if `add_special_tokens`.

        The literal text of a special token, such as `<|im_start|>`, becomes that token, as in Hugging Face's tokenizers
        and in vLLM: untrusted text in a prompt can contain control tokens. In a rendered chat (`MarkedText`) only those
        of the template become tokens. Raises `InvalidRequest`, naming `param`, for a text with lone surrogates.
        """
        _check_encodable(text, param)
        if not isinstance(text, MarkedText):
            return self._encoder.encode(text, add_special_tokens=add_special_tokens)
        encoded = (
            [part] if isinstance(part, int) else self._encoder.encode_words(part, is_first=index == 0)
            for index, part in enumerate(text.parts)
        )
        before, after = self._ids_around if add_special_tokens else ([], [])
        return [*before, *chain.from_iterable(encoded), *after]

    @cached_property
    def _ids_around(self) -> tuple[list[int], list[int]]:
        return ids_around(lambda adds: self._encoder.encode("a", add_special_tokens=adds))

    @property
    def encodes_in_process(self) -> bool:
        """Whether this process encodes, so that a short text takes microseconds."""
        return self._encoder.is_in_process

    def encode_infill(self, text: InfillText, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a fill-in-the-middle prompt for a gap in a text. Control tokens in the texts stay text.

        Raises `InvalidRequest` for a vocabulary without the tokens of such a prompt.
        """
        if self.infill is None:
            raise InvalidRequest(
                "suffix cannot be obeyed: the model's vocabulary has no tokens for filling in, such as <|fim_prefix|>",
                param="suffix",
                code="unsupported_parameter",
            )
        _check_encodable(text.before, "prompt")
        _check_encodable(text.after, "suffix")
        _check_encodable(text.start, "start")
        encode, further = self._encoder.encode_words, partial(self._encoder.encode_words, is_first=False)
        prompt = self.infill.prompt(encode(text.before, is_first=True), further(text.after))
        if text.start:
            prompt += further(text.start)
        if text.files:
            _check_encodable("".join(chain.from_iterable(text.files)), "files")
            prompt = self.infill.context(text.files, further) + prompt
        adds_bos = add_special_tokens and self.bos_token_id in self._ids_around[0]
        return [self.bos_token_id, *prompt] if adds_bos and self.bos_token_id is not None else prompt

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues another one: no BOS, no leading space, no control tokens."""
        return self._encoder.encode_words(text, is_first=False)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of a text, from its length alone. 0: no bound is known.

        With it, a text that is far too long is refused without encoding it, which takes seconds for megabytes.
        """
        return len(text) // self._max_characters if self._max_characters else 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD.

        The space that some vocabularies put before a text's first word is removed. `Detokenizer` keeps it.
        """
        skipped = self.special_token_ids if skip_special_tokens else frozenset[int]()
        data = b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped)
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token: the literal text of a special token, b"" for an unknown id."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def first_difference(self, other: Tokenizer) -> int | None:
        """The first token id with another text in `other`. None if all ids that both have agree."""
        pairs = enumerate(zip(self._bytes, other._bytes, strict=False))
        return next((token_id for token_id, (own, others) in pairs if own != others), None)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token with this text, or None."""
        return self._special_ids.get(text)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {self.token_text(token_id): token_id for token_id in self.special_token_ids}

    def token_text(self, token_id: int) -> str:
        """A token's text for display; an incomplete character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @property
    def chat_template_text(self) -> str | None:
        """The Jinja text of the model's chat template. None without a template, or for a format without Jinja."""
        return None if self.chat_format is None else self.chat_format.text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extras: TemplateExtras = NO_EXTRAS,
    ) -> str:
        """The chat in the text format of the model. Raises `InvalidRequest` if its template cannot render the chat.

        Messages have the shape of OpenAI's chat API. With `continue_final_message` the text ends with the content of
        the last message.
        """
        if self.chat_format is None:
            raise InvalidRequest(
                "Error in applying chat template from request: the model has no chat template; use /v1/completions",
                param="messages",
            )
        if not continue_final_message:
            return self.chat_format.render(messages, add_generation_prompt=add_generation_prompt, extras=extras)
        end = f"END{secrets.token_hex(8)}"  # occurs in no message
        *others, last = messages
        marked = [*others, {**last, "content": joined_text(last.get("content")) + end}]
        rendered = self.chat_format.render(marked, add_generation_prompt=False, extras=extras)
        text = cut_before_last(rendered, end)
        if text is None:
            raise InvalidRequest(
                "continue_final_message: the chat template does not end with the last message as it is",
                param="continue_final_message",
            )
        return text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a rendered chat. The template writes BOS itself, so none is added."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False, param="messages")

    def close(self) -> None:
        """End the child processes that render and encode; the last reference ends them too. May be called twice."""
        self._encoder.close()
        if self.chat_format is not None:
            self.chat_format.close()


def ids_around(encode: Callable[[bool], list[int]]) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and after a text. `encode` encodes one text, with them or without.

    Of a text that has no ids of its own the first one counts as before it.
    """
    whole, bare = encode(True), encode(False)
    if not bare:
        return whole[:1], whole[1:]
    start = next((index for index in range(len(whole)) if whole[index : index + len(bare)] == bare), None)
    return ([], []) if start is None else (whole[:start], whole[start + len(bare) :])


def _check_encodable(text: str, param: str | None) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("text holds a lone surrogate, which UTF-8 cannot encode", param=param) from None


def _whole_text(table: tuple[bytes, ...], token_id: int) -> str | None:
    data = table[token_id] if 0 <= token_id < len(table) else b""
    text, num_used = codecs.utf_8_decode(data, "replace", False)
    return text if num_used == len(data) else None

"""The bytes of each token, derived once from the description of the tokenizer's own decoder.

Text is then decoded token by token. Decoders whose result is not the bytes of each token in turn are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from brlite.errors import ModelError

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PIECE_STEPS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


class TokenBytes(NamedTuple):
    """`table` maps an id to its bytes; `strips_first_space` if a whole text loses one leading space when decoded."""

    table: tuple[bytes, ...]
    strips_first_space: bool


def read_token_bytes(backend: tokenizers.Tokenizer, *, source: str) -> TokenBytes:
    """Raises `ModelError`, naming `source`, if the tokenizer's decoder is of an unknown kind. Unused ids get b""."""
    steps: list[dict[str, Any]] = []
    if backend.decoder is not None:
        decoder = json.loads(backend.decoder.__getstate__())
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    to_bytes = _converter(steps, source)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        table[token_id] = to_bytes(token)
    for token_id, added in backend.get_added_tokens_decoder().items():
        table[token_id] = added.content.encode()
    strips_first_space = any(
        step["content"] == " " and step["start"] > 0
        if step["type"] == "Strip"
        else step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps
    )
    return TokenBytes(tuple(table), strips_first_space)


def _converter(steps: list[dict[str, Any]], source: str) -> Callable[[str], bytes]:
    kinds = [str(step["type"]) for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_converter()
    replacements = [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    replacements += [
        (step["pattern"].get("String"), step["content"])  # None for a pattern, which is not supported
        for step in steps
        if step["type"] == "Replace"
    ]
    if not replacements or not _PIECE_STEPS.issuperset(kinds) or None in (old for old, _ in replacements):
        raise ModelError(
            f"{source}: its decoder ({', '.join(kinds) or 'none'}) is not supported; "
            "allowed are ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse and Strip"
        )

    def convert(token: str) -> bytes:
        if "ByteFallback" in kinds and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return convert


def _byte_level_converter() -> Callable[[str], bytes]:
    """GPT-2's alphabet: printable bytes are their own character, the others follow from U+0100 on.

    Characters below U+0100 that are not in the alphabet are mapped to one that is no byte.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    to_latin1 = {byte: byte if byte in printable else 0xFFFF for byte in range(0x100)}
    to_latin1 |= {0x100 + index: byte for index, byte in enumerate(others)}

    def convert(token: str) -> bytes:
        try:
            return token.translate(to_latin1).encode("latin-1")
        except UnicodeEncodeError:  # a character outside GPT-2's alphabet: the token stands for itself
            return token.encode()

    return convert

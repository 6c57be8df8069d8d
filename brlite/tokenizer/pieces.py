"""Vocabularies of sentencepiece's BPE kind: pieces with scores, and bytes for what no piece covers.

Both a bare `tokenizer.model` and a GGUF file of kind `llama` hold these. Knows no BOS, no EOS and no chats.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from brlite.checkpoint.model_file import check_model_file
from brlite.errors import ModelError
from brlite.files.quoting import reason
from brlite.tokenizer.piece_encoder import PieceEncoder

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# What a reading of a tokenizer.model must agree on with sentencepiece itself before it is trusted.
_SAMPLES = (
    "Hello world",
    "a  b\n\tc ",
    "In 2024: 3.14159",
    "Füße ½ ﬁ Ａ e\u0301",
    "你好，世界 🙂",
    "for(i=0;i<n;i++){x[i]+=1;}",
)


MAX_PIECE = 1024  # characters: sentencepiece's own limit is 16 unless its makers raise it


_PIECE, _KIND = 1, 3  # fields of sentencepiece's ModelProto and of its SentencePiece


class PieceKind(enum.IntEnum):
    """What a token is for. The numbers are sentencepiece's and GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class VocabularyPiece(NamedTuple):
    """One token; its id is its place in the list. A pair of pieces joins earlier the higher the score of the result."""

    text: str
    score: float
    kind: PieceKind


def build_backend(pieces: Sequence[VocabularyPiece], *, add_space_prefix: bool) -> Tokenizer:
    """A tokenizer that cuts text as sentencepiece does with these pieces. Every stretch between special tokens counts
    as a text of its own, and gets its own space in front with `add_space_prefix`."""
    unknown = next((piece.text for piece in pieces if piece.kind is PieceKind.UNKNOWN), None)
    vocabulary = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    add_typed_tokens(backend, ((piece.text, piece.kind) for piece in pieces))
    return backend


def add_typed_tokens(backend: Tokenizer, tokens: Iterable[tuple[str, int]]) -> None:
    """Make control tokens special, and those that the model's makers added findable whole in a text."""
    special, added = [], []
    for text, kind in tokens:
        if kind in (PieceKind.CONTROL, PieceKind.UNKNOWN):
            special.append(AddedToken(text, normalized=False, special=True))
        elif kind == PieceKind.USER_DEFINED:
            added.append(AddedToken(text, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(added)


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a bare `tokenizer.model`. Raises `ModelError` for one that is not BPE or rewrites its text."""
    processor = open_sentencepiece(path)
    backend = build_backend(read_pieces(processor), add_space_prefix=starts_with_space(processor))
    encoder = PieceEncoder(backend, add_space_prefix=starts_with_space(processor))
    for sample in _SAMPLES:
        if encoder.encode_words(sample, is_first=True) != processor.encode(sample):
            raise ModelError(
                f"{path}: not a BPE model that keeps its text as it is; convert the tokenizer to a tokenizer.json"
            )
    return backend


def open_sentencepiece(path: Path) -> SentencePieceProcessor:
    """Raises `ModelError` for a file that is no sentencepiece model."""
    from sentencepiece import SentencePieceProcessor

    check_model_file(path)
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: not a sentencepiece model: {reason(error)}") from None


def read_pieces(processor: SentencePieceProcessor) -> list[VocabularyPiece]:
    """Every piece in the order of the ids."""
    kinds = _kinds(processor.serialized_model_proto())
    return [
        VocabularyPiece(processor.id_to_piece(token_id), processor.get_score(token_id), kind)
        for token_id, kind in zip(range(processor.get_piece_size()), kinds, strict=True)
    ]


def starts_with_space(processor: SentencePieceProcessor) -> bool:
    """Whether a text gets a space in front before it is cut."""
    return str(processor.encode("a", out_type=str)[0]).startswith("▁")


def _kinds(model: bytes) -> list[PieceKind]:
    """The kinds of the pieces: field 3 of each field 1 of the model's protocol buffer, 1 where it is left out.

    The package does not tell which pieces users defined, and its generated reader needs another package.
    """
    return [
        PieceKind(next((int(value) for number, value in _fields(piece) if number == _KIND), PieceKind.NORMAL))
        for number, piece in _fields(model)
        if number == _PIECE and isinstance(piece, bytes)
    ]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message that the package has read before: numbers, and bytes of the rest."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        length, at = _varint(message, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _merges(pieces: Sequence[VocabularyPiece]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order in which sentencepiece would: best score first."""
    longest = max((len(piece.text) for piece in pieces), default=0)
    if longest > MAX_PIECE:
        raise ModelError(f"a piece of the vocabulary has {longest} characters; at most {MAX_PIECE} are allowed")
    ids = {piece.text: token_id for token_id, piece in enumerate(pieces) if piece.kind is PieceKind.NORMAL}
    ranked = []
    for text, token_id in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-pieces[token_id].score, token_id, left, right))
    ranked.sort()
    return [(pieces[left].text, pieces[right].text) for _, _, left, right in ranked]

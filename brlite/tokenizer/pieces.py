"""Vocabularies of sentencepiece's BPE kind: pieces with scores, and bytes for other characters.

Both a bare `tokenizer.model` and a GGUF file of kind `llama` hold these. Reads no files.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from brlite.errors import ModelError

MAX_PIECE = 1024  # characters: sentencepiece's own default is 16


class PieceKind(enum.IntEnum):
    """The kind of a token. The numbers are sentencepiece's and GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class VocabularyPiece(NamedTuple):
    """One token; its id is its index in the list. Pairs whose joined piece has the highest score are joined first."""

    text: str
    score: float
    kind: PieceKind


def build_backend(pieces: Sequence[VocabularyPiece], *, add_space_prefix: bool) -> Tokenizer:
    """A tokenizer that cuts text as sentencepiece does with these pieces. Each part of a text between special tokens is
    cut by itself, and gets a space in front with `add_space_prefix`."""
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
    """Add control tokens as special tokens, and user-defined ones as tokens that are never cut."""
    special, added = [], []
    for text, kind in tokens:
        if kind in (PieceKind.CONTROL, PieceKind.UNKNOWN):
            special.append(AddedToken(text, normalized=False, special=True))
        elif kind == PieceKind.USER_DEFINED:
            added.append(AddedToken(text, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(added)


def add_bos_eos(backend: Tokenizer, *, bos_token_id: int | None, eos_token_id: int | None) -> None:
    """Make `encode` add BOS and EOS, where they are not None, to a text that is encoded with special tokens."""
    ends = {"bos": bos_token_id, "eos": eos_token_id}
    template = [name for name in ("bos", "$A", "eos") if ends.get(name, 0) is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[
            {"id": name, "ids": [token_id], "tokens": [backend.id_to_token(token_id)]}
            for name, token_id in ends.items()
            if token_id is not None
        ],
    )


def _merges(pieces: Sequence[VocabularyPiece]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a third, in sentencepiece's order: best score first."""
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

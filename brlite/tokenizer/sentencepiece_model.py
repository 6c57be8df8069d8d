"""A `tokenizer.model` run by the sentencepiece package itself, for models whose folders bring code for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from brlite.errors import ModelError
from brlite.tokenizer.pieces import PieceKind, VocabularyPiece, open_sentencepiece, read_pieces, starts_with_space
from brlite.tokenizer.token_bytes import TokenBytes
from brlite.tokenizer.tokenizer import Encoder

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePieceEncoder(Encoder):
    """An `Encoder`. `prefix` are the ids that stand before a text encoded with special tokens."""

    max_composed = 0  # what a model's normaliser does to a text is not known here

    def __init__(
        self, processor: SentencePieceProcessor, prefix: Sequence[int], characters: Mapping[int, list[int]]
    ) -> None:
        """`characters` are the ids of control tokens that the model finds in texts, each with its text's own."""
        self._processor = processor
        self._prefix = list(prefix)
        self._characters = characters

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return [*self._prefix, *ids] if add_special_tokens else ids

    def encode_words(self, text: str, *, is_first: bool) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        if self._characters.keys().isdisjoint(ids):
            return ids
        return [part for token_id in ids for part in self._characters.get(token_id, (token_id,))]


class SentencePieceModel:
    """The pieces of a model in the order of their ids, and behind them `control_tokens`, which no text contains."""

    def __init__(self, path: Path, control_tokens: Sequence[str] = ()) -> None:
        """Raises `ModelError` for a file that is no sentencepiece model."""
        self._path = path
        self._processor = open_sentencepiece(path)
        self.pieces = read_pieces(self._processor)
        self.ids = {text: len(self.pieces) + index for index, text in enumerate(control_tokens)}

    def piece_id(self, text: str) -> int | None:
        """The id of a piece; None if the model has no such piece."""
        token_id: int = self._processor.piece_to_id(text)
        return token_id if self.pieces[token_id].text == text else None

    @property
    def special_token_ids(self) -> list[int]:
        kinds = (PieceKind.CONTROL, PieceKind.UNKNOWN)
        return [*(i for i, piece in enumerate(self.pieces) if piece.kind in kinds), *self.ids.values()]

    @property
    def eos_token_id(self) -> int:
        token_id: int = self._processor.eos_id()
        if token_id < 0:
            raise ModelError(f"{self._path}: the model has no end token")
        return token_id

    def encoder(self, prefix: Sequence[int] = (), control_ids: Iterable[int] = ()) -> SentencePieceEncoder:
        """`control_ids` are pieces that no message may become, although the model finds them in texts."""
        characters = {token_id: self._character_ids(self.pieces[token_id].text) for token_id in control_ids}
        return SentencePieceEncoder(self._processor, prefix, characters)

    def _character_ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in text:
            token_id = self.piece_id(character)
            names = [f"<0x{byte:02X}>" for byte in character.encode()]
            known = [self.piece_id(name) for name in names] if token_id is None else [token_id]
            ids += [token_id for token_id in known if token_id is not None]
        return ids

    def token_bytes(self) -> TokenBytes:
        control = [VocabularyPiece(text, 0.0, PieceKind.CONTROL) for text in self.ids]
        table = tuple(_bytes(piece) for piece in (*self.pieces, *control))
        return TokenBytes(table, starts_with_space(self._processor))


def _bytes(piece: VocabularyPiece) -> bytes:
    if piece.kind is PieceKind.BYTE:
        return bytes.fromhex(piece.text.removeprefix("<0x").removesuffix(">"))
    return piece.text.replace("▁", " ").encode()

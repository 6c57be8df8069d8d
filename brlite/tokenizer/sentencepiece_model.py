"""A `tokenizer.model`: rebuilt from its pieces, or run by the sentencepiece package where folders bring code.

The package runs only in a child process. A file's content is checked before (`sentencepiece_file.py`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from tokenizers import Tokenizer as Backend

from brlite.chat.control_tokens import ControlToken, ControlTokens, is_control
from brlite.errors import InvalidRequest, ModelError
from brlite.process.sandbox import ChildLimits
from brlite.tokenizer.encoder import EncoderProcess, encode_ids
from brlite.tokenizer.pieces import PieceKind, VocabularyPiece, build_backend
from brlite.tokenizer.sentencepiece_file import SentencePieceFile, read_sentencepiece_file
from brlite.tokenizer.token_bytes import TokenBytes
from brlite.tokenizer.tokenizer import Encoder, ids_around

_SPACE = "▁"
# Texts that a rebuilt tokenizer.model must encode as sentencepiece itself does; else it is refused.
_SAMPLES = (
    "Hello world",
    "a  b\n\tc ",
    "In 2024: 3.14159",
    "Füße ½ ﬁ Ａ e\u0301",
    "你好，世界 🙂",
    "for(i=0;i<n;i++){x[i]+=1;}",
)


def read_sentencepiece(path: Path, limits: ChildLimits) -> Backend:
    """The tokenizer of a bare `tokenizer.model`. Raises `ModelError` for one that is not BPE or rewrites its text."""
    file = read_sentencepiece_file(path)
    with closing(_start_process(path, file, limits)) as process:
        starts_with_space = process.description["starts_with_space"]
        backend = build_backend(file.pieces, add_space_prefix=starts_with_space)
        encoder = PieceEncoder(backend, add_space_prefix=starts_with_space)
        try:
            is_same = all(
                encoder.encode_words(sample, is_first=True) == process.encode(text=sample) for sample in _SAMPLES
            )
        except InvalidRequest as error:
            raise ModelError(f"{path}: {error}") from None
    if not is_same:
        raise ModelError(
            f"{path}: not supported: its tokens differ from those of a plain BPE model (it is another kind, or "
            "rewrites the text first); convert the tokenizer to a tokenizer.json"
        )
    return backend


def _start_process(path: Path, file: SentencePieceFile, limits: ChildLimits) -> EncoderProcess:
    setup = {"sentencepiece": base64.b64encode(file.data).decode()}
    try:
        process = EncoderProcess("sentencepiece", setup, len(file.data), limits)
    except ModelError as error:
        raise ModelError(f"{path}: not a sentencepiece model: {error}") from None
    if process.description["num_pieces"] != len(file.pieces):
        process.close()
        raise ModelError(f"{path}: not a sentencepiece model: the library finds another number of pieces")
    return process


class PieceEncoder(Encoder):
    """An `Encoder` for a tokenizer of `build_backend`, which puts one space before a text, as sentencepiece does.

    The `tokenizers` package adds a space after each added token, too. So added tokens are found here, and the text
    between them is given to that package. They are control tokens or words.
    """

    max_composed = 0  # tokens may absorb white space

    def __init__(self, backend: Backend, *, add_space_prefix: bool) -> None:
        added = backend.get_added_tokens_decoder()
        tokens = {
            token.content: ControlToken(token_id, token.lstrip, token.rstrip, token.single_word)
            for token_id, token in added.items()
        }
        is_word = {token.content: not is_control(token) for token in added.values()}
        self._controls = ControlTokens({text: token for text, token in tokens.items() if not is_word[text]})
        self._words = ControlTokens({text: token for text, token in tokens.items() if is_word[text]})
        self._pieces = Backend(backend.model)  # for text that has `▁` in place of spaces
        self._prefix = _SPACE if add_space_prefix else ""
        self._before, self._after = ids_around(lambda adds: backend.encode("a", add_special_tokens=adds).ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._controls.split(text)):
            ids += [part] if isinstance(part, int) else self.encode_words(part, is_first=index == 0)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def encode_words(self, text: str, *, is_first: bool) -> list[int]:
        prefix = self._prefix if is_first and text else ""
        ids: list[int] = []
        for part in self._words.split(prefix + text.replace(" ", _SPACE)):
            ids += [part] if isinstance(part, int) else encode_ids(self._pieces, part)
        return ids


class SentencePieceEncoder(Encoder):
    """An `Encoder`. `prefix` are the ids before a text that is encoded with special tokens."""

    max_composed = 0  # the effect of a model's normalizer is not known here

    def __init__(self, process: EncoderProcess, prefix: Sequence[int], characters: Mapping[int, list[int]]) -> None:
        """`characters`: id of a control token that the model finds in texts → ids of the characters of its text."""
        self._process = process
        self._prefix = list(prefix)
        self._characters = characters

    @property
    def is_in_process(self) -> bool:
        return False

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = self._process.encode(text=text)
        return [*self._prefix, *ids] if add_special_tokens else ids

    def encode_words(self, text: str, *, is_first: bool) -> list[int]:
        ids = self._process.encode(text=text)
        if self._characters.keys().isdisjoint(ids):
            return ids
        return [part for token_id in ids for part in self._characters.get(token_id, (token_id,))]

    def close(self) -> None:
        self._process.close()


class SentencePieceModel:
    """The pieces of a model in the order of their ids, then `control_tokens`, which no text is encoded to."""

    def __init__(self, path: Path, control_tokens: Sequence[str] = (), *, limits: ChildLimits) -> None:
        """Raises `ModelError` for a file that is no sentencepiece model. `limits` are for one text."""
        self._path = path
        file = read_sentencepiece_file(path)
        self.pieces = file.pieces
        self.ids = {text: len(self.pieces) + index for index, text in enumerate(control_tokens)}
        self._piece_ids = {piece.text: token_id for token_id, piece in enumerate(self.pieces)}
        self._process = _start_process(path, file, limits)

    def piece_id(self, text: str) -> int | None:
        """The id of a piece; None if the model has no such piece."""
        return self._piece_ids.get(text)

    @property
    def special_token_ids(self) -> list[int]:
        kinds = (PieceKind.CONTROL, PieceKind.UNKNOWN)
        return [*(i for i, piece in enumerate(self.pieces) if piece.kind in kinds), *self.ids.values()]

    @property
    def eos_token_id(self) -> int:
        token_id: int = self._process.description["eos_token_id"]
        if token_id < 0:
            raise ModelError(f"{self._path}: the model has no end token")
        return token_id

    def encoder(self, prefix: Sequence[int] = (), control_ids: Iterable[int] = ()) -> SentencePieceEncoder:
        """`encode_words` replaces the pieces `control_ids`, which the model finds in texts, by their characters."""
        characters: dict[int, list[int]] = {}
        for control_id in control_ids:
            ids = characters[control_id] = []
            for character in self.pieces[control_id].text:
                token_id = self.piece_id(character)
                names = [f"<0x{byte:02X}>" for byte in character.encode()]
                known = [self.piece_id(name) for name in names] if token_id is None else [token_id]
                ids += [token_id for token_id in known if token_id is not None]
        return SentencePieceEncoder(self._process, prefix, characters)

    def token_bytes(self) -> TokenBytes:
        control = [VocabularyPiece(text, 0.0, PieceKind.CONTROL) for text in self.ids]
        table = [
            bytes.fromhex(piece.text.removeprefix("<0x").removesuffix(">"))
            if piece.kind is PieceKind.BYTE
            else piece.text.replace(_SPACE, " ").encode()
            for piece in (*self.pieces, *control)
        ]
        return TokenBytes(tuple(table), self._process.description["starts_with_space"])

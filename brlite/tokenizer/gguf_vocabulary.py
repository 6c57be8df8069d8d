"""The tokenizer inside a GGUF file: byte-level BPE with merges (`gpt2`) or sentencepiece's pieces (`llama`).

It is rebuilt from the file's own lists, because loaders that choose by the architecture's name lose details: in
SmolLM2, for example, each digit is a token. Reads no weights.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from brlite.chat.control_tokens import read_control_tokens
from brlite.chat.template import ChatTemplate, read_template
from brlite.checkpoint.gguf_header import GGUF_KEYS, read_gguf_header
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason
from brlite.tokenizer.encoder import BackendEncoder, is_panic
from brlite.tokenizer.infill import find_infill_tokens
from brlite.tokenizer.pieces import PieceKind, VocabularyPiece, add_bos_eos, add_typed_tokens, build_backend
from brlite.tokenizer.pre_tokenizers import SPLITTINGS, Splitting, build_pre_tokenizer
from brlite.tokenizer.token_bytes import read_token_bytes
from brlite.tokenizer.tokenizer import SpecialTokenIds, Tokenizer, TokenizerOptions

# A GGUF file names only some of its end tokens. These end a text or a turn, too, in any vocabulary that has them:
# those of `_ENDS`, which have no other use, whatever type the converter gave them; those of `_CONTROL_ENDS` only if
# they are control tokens.
_ENDS = (
    *("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
    *("<|return|>", "<|call|>"),
    *("<|eot|>", "<|EOT|>", "<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
)
_CONTROL_ENDS = ("</s>", "<eos>", "<EOT>", "[EOT]", "<turn|>")
_CHATGLM_PREFIX = "[gMASK]"  # a vocabulary that has it uses the role tokens as end tokens
_CHATGLM_ENDS = ("<|user|>", "<|observation|>")
# GGUF keys of the fill-in-the-middle tokens, each with its older name.
_INFILL_KEYS = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"), ("fim_rep",), ("fim_sep",))
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}  # defaults of a `llama` vocabulary


def load_gguf(path: Path, options: TokenizerOptions) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises `ModelError` that names the missing or wrong metadata key."""
    vocabulary = _Vocabulary(path, read_gguf_header(path, with_texts=True).metadata)
    backend = _build_with_ends(vocabulary)
    file, limits, control_tokens_in_text = options
    template = read_template(file) if file else vocabulary.get("tokenizer.chat_template", str)
    special = _special_token_ids(backend)
    token_bytes, eos_token_ids = read_token_bytes(backend, source=str(path)), _eos_token_ids(vocabulary, special)
    chat_format = None
    if template is not None:
        chat_format = ChatTemplate(
            template,
            source=str(file or path),
            special_tokens=vocabulary.named_tokens(),
            control_tokens=None if control_tokens_in_text else read_control_tokens(backend),
            limits=limits,
        )
    return Tokenizer(
        BackendEncoder(backend),
        token_bytes,
        SpecialTokenIds(vocabulary.token_id("bos"), eos_token_ids, special),
        chat_format,
        find_infill_tokens(backend.token_to_id, vocabulary.infill_token_ids()),
    )


def hugging_face_files(path: Path) -> dict[str, bytes]:
    """The tokenizer of a GGUF file as the files of a Hugging Face folder, by file name. Token ids are the same.

    `generation_config.json` has the end tokens, and the sampling values that the file recommends. Raises
    `ModelError` as `load_gguf` does.
    """
    metadata = read_gguf_header(path, with_texts=True).metadata
    vocabulary = _Vocabulary(path, metadata)
    backend = _build_with_ends(vocabulary)
    sampling = {name: metadata[key] for name, key in GGUF_KEYS.items() if metadata.get(key) is not None}
    ends = sorted(set(_eos_token_ids(vocabulary, _special_token_ids(backend))))
    files = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(vocabulary.named_tokens(), indent=1),
        "generation_config.json": json.dumps({"eos_token_id": ends, **sampling}, indent=1),
        "chat_template.jinja": vocabulary.get("tokenizer.chat_template", str),
    }
    return {name: text.encode() for name, text in files.items() if text is not None}


def _build_with_ends(vocabulary: _Vocabulary) -> Backend:
    """The tokenizer with BOS and EOS."""
    backend = _build(vocabulary)
    adds_bos = vocabulary.flag("add_bos_token", vocabulary.kind == "llama" or vocabulary.splitting().adds_bos)
    adds_eos = vocabulary.flag("add_eos_token", False)
    ends = {name: vocabulary.token_id(name) if adds else None for name, adds in (("bos", adds_bos), ("eos", adds_eos))}
    for name, token_id in ends.items():
        if token_id is not None and backend.id_to_token(token_id) is None:
            raise vocabulary.error(f"tokenizer.ggml.{name}_token_id", "is of a text that a later token has, too")
    add_bos_eos(backend, bos_token_id=ends["bos"], eos_token_id=ends["eos"])
    return backend


def _special_token_ids(backend: Backend) -> list[int]:
    return [token_id for token_id, added in backend.get_added_tokens_decoder().items() if added.special]


class _Vocabulary:
    """The tokenizer keys of the header. Types are checked when a key is read."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.tokens: list[str] = []
        self.kind: str = self.require("tokenizer.ggml.model", str)
        self.tokens = self._strings("tokenizer.ggml.tokens")
        token_types: list[int] = self.get("tokenizer.ggml.token_type", list) or [1] * len(self.tokens)
        if len(token_types) != len(self.tokens):
            raise self.error("tokenizer.ggml.token_type", f"has {len(token_types)} entries, not {len(self.tokens)}")
        self.token_types = [
            PieceKind.CONTROL if token in _ENDS else kind for token, kind in zip(self.tokens, token_types, strict=True)
        ]

    def error(self, key: str, what: str) -> ModelError:
        return ModelError(f"{self.path}: {key} {what}")

    def get(self, key: str, kind: type) -> Any:
        """The value of a key, or None if the file does not have it."""
        value = self._metadata.get(key)
        if kind is list and isinstance(value, array):
            if len(value) > len(self.tokens):  # checked before the list takes more memory than the file
                raise self.error(key, f"has {len(value)} entries, not {len(self.tokens)}")
            value = value.tolist()
        if value is not None and not isinstance(value, kind):
            raise self.error(key, f"must be of type {kind.__name__}, got {type(value).__name__}")
        return value

    def require(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(f"tokenizer.ggml.{name}", bool)
        return default if value is None else bool(value)

    def token_id(self, name: str) -> int | None:
        """The id of a named token such as `bos`, if the file has one."""
        key = f"tokenizer.ggml.{name}_token_id"
        token_id: int | None = self.get(key, int)
        if token_id is None and self.kind == "llama":
            token_id = _SENTENCEPIECE_IDS.get(name)
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            raise self.error(key, f"is {token_id}; the vocabulary has the ids 0 to {len(self.tokens) - 1}")
        return token_id

    def named_tokens(self) -> dict[str, str]:
        """The texts of BOS and EOS, as templates name them."""
        ids = {f"{name}_token": self.token_id(name) for name in ("bos", "eos")}
        return {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}

    def infill_token_ids(self) -> list[int | None]:
        """The fill-in-the-middle tokens that the file names: prefix, suffix, middle, repository, file."""
        return [
            next((token_id for name in names if (token_id := self.token_id(name)) is not None), None)
            for names in _INFILL_KEYS
        ]

    def merges(self) -> list[tuple[str, str]]:
        key = "tokenizer.ggml.merges"
        merges = self._strings(key)
        if any(merge.count(" ") != 1 for merge in merges):
            raise self.error(key, "must hold pairs of tokens with one space between them")
        return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]

    def pieces(self) -> list[VocabularyPiece]:
        key = "tokenizer.ggml.scores"
        scores = self.require(key, list)
        if len(scores) != len(self.tokens):
            raise self.error(key, f"has {len(scores)} entries, not {len(self.tokens)}")
        try:
            kinds = [PieceKind(number) for number in self.token_types]
        except ValueError as error:
            raise self.error("tokenizer.ggml.token_type", f"holds an unknown type: {error}") from None
        return [VocabularyPiece(*entry) for entry in zip(self.tokens, scores, kinds, strict=True)]

    def splitting(self) -> Splitting:
        key = "tokenizer.ggml.pre"
        name = self.get(key, str) or "default"
        if name not in SPLITTINGS:
            raise self.error(key, f"is {excerpt(name)}; known are {', '.join(sorted(SPLITTINGS))}")
        return SPLITTINGS[name]

    def _strings(self, key: str) -> list[str]:
        values = self.require(key, list)
        if not values or not isinstance(values[0], str):  # a GGUF list has one type for all its entries
            raise self.error(key, "must be a list of strings")
        return list(values)


def _build(vocabulary: _Vocabulary) -> Backend:
    if vocabulary.kind not in ("gpt2", "llama"):
        raise vocabulary.error("tokenizer.ggml.model", f"is {excerpt(vocabulary.kind)}; known are gpt2, llama")
    try:
        if vocabulary.kind == "llama":
            return build_backend(vocabulary.pieces(), add_space_prefix=vocabulary.flag("add_space_prefix", True))
        splitting = vocabulary.splitting()
        ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
        model = models.BPE(vocab=ids, merges=vocabulary.merges(), ignore_merges=splitting.ignores_merges)
        backend = Backend(model)
        if splitting.composes_unicode:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = build_pre_tokenizer(splitting)
        backend.decoder = decoders.ByteLevel()
        add_typed_tokens(backend, zip(vocabulary.tokens, vocabulary.token_types, strict=True))
        return backend
    except ModelError:
        raise
    except BaseException as error:  # tokenizers raises bare Exception, for example for a merge of unknown tokens
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise vocabulary.error("tokenizer.ggml", f"is inconsistent: {reason(error)}") from None


def _eos_token_ids(vocabulary: _Vocabulary, special: list[int]) -> list[int]:
    """The end tokens that the file names, then all known end tokens of the vocabulary."""
    named = [vocabulary.token_id(name) for name in ("eos", "eot", "eom")]
    by_text = {vocabulary.tokens[token_id]: token_id for token_id in special}
    texts = (*_ENDS, *_CONTROL_ENDS, *(_CHATGLM_ENDS if _CHATGLM_PREFIX in by_text else ()))
    return [
        *(token_id for token_id in named if token_id is not None),
        *(by_text[text] for text in texts if text in by_text),
    ]

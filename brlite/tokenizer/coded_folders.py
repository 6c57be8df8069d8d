"""Loads tokenizers of folders with tokenizer code beside a sentencepiece model: Baichuan2, ChatGLM2 and ChatGLM3.

That code is never run. Its published behaviour is reimplemented here: the control tokens and the format of chats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from brlite.chat.control_tokens import ControlToken, ControlTokens
from brlite.chat.formats import (
    CHATGLM2_TOKENS,
    CHATGLM3_ENDS,
    CHATGLM3_PREFIX,
    CHATGLM3_TOKENS,
    Baichuan2Format,
    ChatFormat,
    ChatGLM2Format,
    ChatGLM3Format,
)
from brlite.chat.template import ChatTemplate, read_template
from brlite.checkpoint.model_file import exists, read_model_text
from brlite.errors import ModelError
from brlite.files.quoting import excerpt
from brlite.tokenizer.hf import read_eos_token_ids, read_json
from brlite.tokenizer.sentencepiece_model import SentencePieceModel
from brlite.tokenizer.tokenizer import SpecialTokenIds, Tokenizer, TokenizerOptions

MODEL_FILE = "tokenizer.model"
# Baichuan2's role tokens: key of the generation config, which may give another id → default piece.
BAICHUAN2_ROLES = {"user_token_id": "<reserved_106>", "assistant_token_id": "<reserved_107>"}

Loader = Callable[[Path, TokenizerOptions], Tokenizer]


def find_loader(folder: Path) -> Loader | None:
    """The loader for this folder's tokenizer. None for a folder of any other kind."""
    if exists(folder / "tokenizer.json") or not (folder / MODEL_FILE).is_file():
        return None
    return LOADERS.get(str(read_json(folder / "config.json").get("model_type")))


def load_baichuan2(folder: Path, options: TokenizerOptions) -> Tokenizer:
    """No BOS, no EOS; two pieces of the vocabulary mark the turns of the user and of the assistant."""
    model = SentencePieceModel(folder / MODEL_FILE, limits=options.limits)
    roles = _baichuan2_roles(folder, model)
    names = {token_id: model.pieces[token_id].text for token_id in roles.values()}
    chat_format: ChatFormat | None = _operators(options, {text: token_id for token_id, text in names.items()})
    if chat_format is None and roles.keys() == BAICHUAN2_ROLES.keys():
        chat_format = Baichuan2Format(**roles, names=names)
    control = [*model.special_token_ids, *roles.values()]
    return Tokenizer(
        model.encoder(control_ids=roles.values()),
        model.token_bytes(),
        SpecialTokenIds(None, read_eos_token_ids(folder, model.eos_token_id), control),
        chat_format,
    )


def load_chatglm3(folder: Path, options: TokenizerOptions) -> Tokenizer:
    """`[gMASK]sop` before every text. Control tokens have ids after the vocabulary; no text is encoded to them."""
    code = folder / "tokenization_chatglm.py"
    # Both versions have one `model_type`. Only ChatGLM3's code, which is not run, has role tokens.
    if exists(code):
        is_chatglm2 = "<|assistant|>" not in read_model_text(code)
    else:
        is_chatglm2 = "chatglm2" in str(read_json(folder / "config.json").get("_name_or_path")).lower()
    control_tokens = CHATGLM2_TOKENS if is_chatglm2 else CHATGLM3_TOKENS
    model = SentencePieceModel(folder / MODEL_FILE, control_tokens, limits=options.limits)
    own_format = (ChatGLM2Format if is_chatglm2 else ChatGLM3Format)(model.ids)
    ends = [] if is_chatglm2 else [model.ids[text] for text in CHATGLM3_ENDS]
    return Tokenizer(
        model.encoder(prefix=[model.ids[text] for text in CHATGLM3_PREFIX]),
        model.token_bytes(),
        SpecialTokenIds(None, read_eos_token_ids(folder, model.eos_token_id, *ends), model.special_token_ids),
        _operators(options, model.ids) or own_format,
    )


LOADERS: Mapping[str, Loader] = {"baichuan": load_baichuan2, "chatglm": load_chatglm3}


def _operators(options: TokenizerOptions, ids: Mapping[str, int]) -> ChatTemplate | None:
    """The template of the operator's file. It can write the control tokens in `ids`; texts of messages cannot."""
    if options.chat_template is None:
        return None
    tokens = {text: ControlToken(token_id) for text, token_id in ids.items()}
    return ChatTemplate(
        read_template(options.chat_template),
        source=str(options.chat_template),
        special_tokens={},
        control_tokens=ControlTokens(tokens, are_written_by_id=True),
        limits=options.limits,
    )


def _baichuan2_roles(folder: Path, model: SentencePieceModel) -> dict[str, int]:
    """The token ids of the roles, without roles that the folder has no token for."""
    named: dict[str, Any] = read_json(folder / "generation_config.json")
    roles: dict[str, int] = {}
    for key, piece in BAICHUAN2_ROLES.items():
        token_id = named.get(key, model.piece_id(piece))
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < len(model.pieces):
            raise ModelError(
                f"{folder / 'generation_config.json'}: {key} must be a token id below {len(model.pieces)}, "
                f"got {excerpt(token_id)}"
            )
        roles[key] = token_id
    return roles

"""The tokenizer of a Hugging Face folder: `tokenizer.json`, or a bare sentencepiece `tokenizer.model` in older ones.

Small JSON files beside it name the special tokens, the end tokens and the chat template. No code of the folder is run,
and transformers is not needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from brlite.chat.control_tokens import read_control_tokens
from brlite.chat.formats import ChatFormat
from brlite.chat.template import ChatTemplate, NamedTemplates, read_template
from brlite.checkpoint.model_file import (
    BUNDLED_TOOL_TEMPLATE_FILE,
    TOOL_TEMPLATE_FILE,
    exists,
    read_json_object,
    read_model_text,
)
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason
from brlite.tokenizer.encoder import BackendEncoder, is_panic
from brlite.tokenizer.infill import find_infill_tokens
from brlite.tokenizer.json_check import check_tokenizer_json
from brlite.tokenizer.pieces import add_bos_eos
from brlite.tokenizer.pre_tokenizers import ends_soon
from brlite.tokenizer.sentencepiece_model import PieceEncoder, read_sentencepiece
from brlite.tokenizer.token_bytes import read_token_bytes
from brlite.tokenizer.tokenizer import Encoder, SpecialTokenIds, Tokenizer, TokenizerOptions

logger = logging.getLogger(__name__)

_SAMPLE = "Hello ﷺ 你好 e\u0301 \ufffd"  # encoding it fails if the library reads beyond the end of a table
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Defaults of a bare sentencepiece model of the Llama family, for fields that tokenizer_config.json lacks.
_SENTENCEPIECE_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}


def load_folder(folder: Path, options: TokenizerOptions) -> Tokenizer:
    """The tokenizer of a folder. Raises `ModelError`, naming the file.

    With a `tokenizer.json`, that file alone decides whether BOS and EOS are added, as in transformers 5; without one,
    `add_bos_token` and `add_eos_token` of `tokenizer_config.json` do. With that file's `legacy`, each stretch between
    special tokens gets a leading space, not only the first.
    """
    has_json = exists(folder / "tokenizer.json")
    config = {
        **({} if has_json else _SENTENCEPIECE_DEFAULTS),
        **read_json(folder / "special_tokens_map.json"),
        **read_json(folder / "tokenizer_config.json"),
    }
    if has_json:
        backend, ends = _read_tokenizer_json(folder / "tokenizer.json")
    else:
        backend, ends = read_sentencepiece(folder / "tokenizer.model", options.limits), True
    _add_listed_tokens(backend, folder, config)
    given = [name for name in _NAMED_TOKENS if config.get(name) is not None]
    tokens = {name: _special_token(config[name], name, folder) for name in given}
    special = _add_special_tokens(backend, folder, config, tokens.values())
    named = {name: token.content for name, token in tokens.items()}
    ids = {name: backend.token_to_id(text) for name, text in named.items()}
    _settle_bos_eos(backend, folder, config, ids, has_json=has_json)
    token_bytes = read_token_bytes(backend, source=str(folder))
    if has_json or config.get("legacy"):
        encoder: Encoder = BackendEncoder(backend, child_limits=None if ends else options.limits)
    else:
        encoder = PieceEncoder(backend, add_space_prefix=token_bytes.strips_first_space)
    controls = None if options.control_tokens_in_text else read_control_tokens(backend)
    make_template = partial(ChatTemplate, special_tokens=named, control_tokens=controls, limits=options.limits)
    return Tokenizer(
        encoder,
        token_bytes,
        SpecialTokenIds(ids.get("bos_token"), read_eos_token_ids(folder, ids.get("eos_token")), special),
        _read_chat_format(folder, config, options.chat_template, make_template),
        find_infill_tokens(backend.token_to_id),
    )


def _read_tokenizer_json(path: Path) -> tuple[Backend, bool]:
    """The tokenizer, and whether it takes linear time on any text."""
    text = read_model_text(path)
    cost = check_tokenizer_json(path, text)
    try:
        backend = Backend.from_str(text)
        backend.no_truncation()  # training leaves these two in the file
        backend.no_padding()
        ends = cost.has_linear_model and all(map(ends_soon, cost.expressions))
        if ends:
            backend.encode(_SAMPLE)
    except BaseException as error:  # tokenizers raises bare Exception for every kind of broken file, or panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ModelError(f"{path}: {reason(error)}") from None
    return backend, ends


def _add_listed_tokens(backend: Backend, folder: Path, config: dict[str, Any]) -> None:
    """Add tokens of tokenizer_config.json and added_tokens.json that the tokenizer does not have.

    Flags of a token in tokenizer_config.json replace those in tokenizer.json, as in transformers.
    """
    listed: dict[int, AddedToken] = {}
    try:
        for text, token_id in read_json(folder / "added_tokens.json").items():
            listed[int(token_id)] = AddedToken(text, normalized=False)
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            listed[int(token_id)] = AddedToken(
                token["content"], **{flag: bool(token.get(flag)) for flag in _TOKEN_FLAGS}
            )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # the last one for infinity
        raise ModelError(
            f"{folder}: added_tokens.json must map texts to ids, and added_tokens_decoder of tokenizer_config.json "
            "ids to objects with a string `content`"
        ) from None

    known = backend.get_added_tokens_decoder()
    named = {int(token_id) for token_id in config.get("added_tokens_decoder", ())}
    to_add = {}
    for token_id, token in sorted(listed.items()):
        same = known.get(token_id)
        if same is not None and (token_id not in named or token.content != same.content):
            continue
        if same is None or any(getattr(token, flag) != getattr(same, flag) for flag in _TOKEN_FLAGS):
            to_add[token_id] = token
    backend.add_tokens(list(to_add.values()))  # in one call: each call sorts all added tokens
    for token_id, token in to_add.items():
        if backend.token_to_id(token.content) != token_id:
            raise ModelError(f"{folder}: added token {excerpt(token.content)} cannot get the id {token_id}")


def _special_token(token: object, name: str, folder: Path) -> AddedToken:
    """A token with the flags of the file. A token that is only a text is not normalized."""
    fields: dict[str, Any] = token if isinstance(token, dict) else {"content": token, "normalized": False}
    if not isinstance(fields.get("content"), str):
        raise ModelError(
            f"{folder}: {name} must be a string or an object with a string `content`, got {excerpt(token)}"
        )
    flags = {flag: bool(fields.get(flag)) for flag in _TOKEN_FLAGS if flag in fields}
    return AddedToken(fields["content"], **{"normalized": False, **flags, "special": True})


def _add_special_tokens(
    backend: Backend, folder: Path, config: dict[str, Any], tokens: Iterable[AddedToken]
) -> set[int]:
    """Make `tokens`, and those in the lists of the JSON files, special. Returns the ids of all special tokens.

    A token that is among the tokenizer's added tokens keeps its flags. A text that is not in the vocabulary stays text:
    the model would have no embedding for a new id.
    """
    tokens = list(tokens)
    for name in _TOKEN_LISTS:
        listed = config.get(name) or []
        if not isinstance(listed, list | dict):
            raise ModelError(f"{folder}: {name} must be a list or an object, got {excerpt(listed)}")
        values = listed.values() if isinstance(listed, dict) else listed
        tokens += [_special_token(token, name, folder) for token in values]
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    known = [added.get(token.content, token) for token in tokens if backend.token_to_id(token.content) is not None]
    for token in known:
        token.special = True
    backend.add_special_tokens(known)
    flagged = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
    ids = (backend.token_to_id(token.content) for token in known)
    return flagged.union(token_id for token_id in ids if token_id is not None)


def _settle_bos_eos(
    backend: Backend, folder: Path, config: dict[str, Any], ids: dict[str, int | None], *, has_json: bool
) -> None:
    wanted = {name: ids.get(name) if config.get(f"add_{name}") else None for name in ("bos_token", "eos_token")}
    if not has_json:
        add_bos_eos(backend, bos_token_id=wanted["bos_token"], eos_token_id=wanted["eos_token"])
        return
    added = backend.encode("").ids
    for name, token_id in wanted.items():
        is_added = ids.get(name) is not None and ids[name] in added
        if f"add_{name}" in config and is_added != (token_id is not None):
            logger.warning(
                "%s: add_%s is %s, but tokenizer.json decides otherwise", folder, name, excerpt(config[f"add_{name}"])
            )


def _read_chat_format(
    folder: Path, config: dict[str, Any], operators: Path | None, make: Callable[..., ChatTemplate]
) -> ChatFormat | None:
    """The chat template, with a second one for chats with tools if there is one. None if there is no template.

    It is the operator's file, else files of the folder, else text in chat_template.json or tokenizer_config.json.
    """
    jinja_file = folder / "chat_template.jinja"
    template: Any
    source, tool_use = str(folder), None
    if operators is not None:
        template, source = read_template(operators), str(operators)
    elif exists(jinja_file):
        template, source = read_model_text(jinja_file), str(jinja_file)
        for tool_use_file in (folder / TOOL_TEMPLATE_FILE, folder / BUNDLED_TOOL_TEMPLATE_FILE):
            tool_use = read_model_text(tool_use_file) if exists(tool_use_file) else tool_use
    else:
        template = read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
        if isinstance(template, list):
            template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        if named := template if isinstance(template, dict) else {}:
            template, tool_use = named.get("default", named), named.get("tool_use")
        if not all(text is None or isinstance(text, str) for text in (template, tool_use)):
            raise ModelError(f"{folder}: chat_template must be a string, or a list of named ones with a `default`")
    if template is None:
        return None
    chat_template = make(template, source=source)
    return NamedTemplates(chat_template, make(tool_use, source=source)) if tool_use else chat_template


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_json_object(path) if exists(path) else {}


def read_eos_token_ids(folder: Path, *others: int | None) -> list[int]:
    """The ids that end a completion: those of the generation config and the model's config, then `others`."""
    token_ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in values):
            raise ModelError(f"{folder / name}: eos_token_id must be token ids, got {excerpt(value)}")
        token_ids += values
    return [*token_ids, *(token_id for token_id in others if token_id is not None)]

"""Loads the tokenizer of a path: finds its kind and calls the loader of that kind."""

from __future__ import annotations

import logging
from pathlib import Path

from brlite.checkpoint.model_file import exists, gguf_files, is_gguf
from brlite.errors import ModelError
from brlite.files.quoting import one_line
from brlite.process.sandbox import ChildLimits
from brlite.tokenizer.tokenizer import Tokenizer, TokenizerOptions

logger = logging.getLogger(__name__)

# Vocabularies that only a model's own code, or another library, can read.
OTHER_TOKENIZERS = ("vocab.json", "*tiktoken*", "tekken.json", "vocab.txt", "spiece.model", "sentencepiece*.model")
AS_JSON = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes a tokenizer.json"


def load_tokenizer(
    path: Path,
    *,
    chat_template: Path | None = None,
    template_limits: ChildLimits | None = None,
    control_tokens_in_text: bool = False,
) -> Tokenizer:
    """The tokenizer of a model: a Hugging Face folder, a `.gguf` file, or a folder that holds one `.gguf` file.

    `chat_template` names a file with a Jinja template that replaces the model's own; `template_limits` bound
    it for one chat. With `control_tokens_in_text` the text of a control token in a message becomes that token. No code
    from the model is run. Templates run in a process of their own, which `Tokenizer.close` ends.
    """
    options = TokenizerOptions(chat_template, template_limits or ChildLimits(), control_tokens_in_text)
    gguf_file = _gguf_file(path)
    if gguf_file is not None:
        from brlite.tokenizer.gguf_vocabulary import load_gguf

        return load_gguf(gguf_file, options)
    from brlite.tokenizer.coded_folders import find_loader
    from brlite.tokenizer.hf import load_folder

    load_coded = find_loader(path)
    if load_coded is not None:
        if control_tokens_in_text:
            logger.warning("%s: control_tokens_in_text has no effect: its tokenizer finds no control tokens", path)
        return load_coded(path, options)
    return load_folder(path, options)


def check_templates(chat_template: str | None, score_template: str) -> None:
    """Read the template files that a config names. Raises the errors of loading, but for what the templates hold."""
    from brlite.chat.template import read_template
    from brlite.tokenizer.pair_template import NOT_FILES, read_pair_file

    if chat_template is not None:
        read_template(Path(chat_template))
    if score_template not in NOT_FILES:
        read_pair_file(score_template)


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file to read the vocabulary from; None for a folder with a tokenizer of its own."""
    if path.is_file():
        if not is_gguf(path):
            raise ModelError(f"{path}: a tokenizer is read from a model folder or a .gguf file")
        return path
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder or .gguf file")
    if any(exists(path / name) for name in ("tokenizer.json", "tokenizer.model")):
        return None
    found = gguf_files(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{path}: several .gguf files; name one of them")
    others = [name for pattern in OTHER_TOKENIZERS for name in sorted(file.name for file in path.glob(pattern))]
    hint = f"; {one_line(others[0])} is not read: {AS_JSON}" if others else ""
    raise ModelError(f"{path}: no tokenizer.json, tokenizer.model or .gguf file{hint}")

"""Parses names of models, `[modelscope:]user/repo[:QUANT][@revision]`, and chooses the repository's files they mean.

Uses no network. On the disk it only checks whether a path exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

from brlite.checkpoint.folder import WEIGHT_FILES
from brlite.checkpoint.model_file import TOOL_TEMPLATE_FILE, gguf_models, part_names
from brlite.checkpoint.pooling_config import MODULES_FILE, POOLING_FILE
from brlite.errors import ModelError
from brlite.files.cache import expand_home
from brlite.files.quoting import MAX_EXCERPT, excerpt, one_line, reason

HubName = Literal["huggingface", "modelscope"]

HUB_VARIABLE = "BRLITE_HUB"
HUB_PREFIXES: dict[str, HubName] = {"hf": "huggingface", "huggingface": "huggingface", "modelscope": "modelscope"}
# The lookahead refuses `..` up to the end of the text: in `FULL_NAME` also in the quantization and the revision.
PLAIN_NAME = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
FULL_NAME = re.compile(
    rf"(?:(?P<hub>{'|'.join(HUB_PREFIXES)}):)?(?P<repository>{PLAIN_NAME.pattern})"
    r"(?::(?P<quantization>\w[\w.-]*))?(?:@(?P<revision>\w[\w./-]*))?",
    re.ASCII | re.IGNORECASE,
)
PATH_STARTS = ("/", ".", "~")
DEFAULT_QUANTIZATION = "Q4_K_M"
# The quantization in a file name: Q4_K_M, IQ3_XXS, Q8_0, UD-Q4_K_XL, BF16.
QUANTIZATION = re.compile(
    r"(?<![a-z0-9])((?:ud-)?(?:i?q\d(?:_(?:\d|k|s|m|l|xl|xs|xxs|nl))*|tq\d_\d|bf16|f16|fp16|f32|mxfp4))(?![a-z0-9])",
    re.I,
)
MAX_CHOICES = 12
MAX_PATH = 1024  # characters of a file's name in a repository, which may name each of 99,999 parts
MAX_NAME = 200  # characters; caches have folders of that name, and a file system takes 255

COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    TOOL_TEMPLATE_FILE,
    MODULES_FILE,
    POOLING_FILE,
)


class ModelName(NamedTuple):
    """The parts of a name. Without `revision` it means the repository's main branch."""

    hub: HubName
    repository: str
    quantization: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        prefix = "modelscope:" if self.hub == "modelscope" else ""
        quantization = f":{self.quantization}" if self.quantization else ""
        return f"{prefix}{self.repository}{quantization}{f'@{self.revision}' if self.revision else ''}"


def parse_model_name(text: str) -> ModelName:
    """Parse a name. The hub is that of the prefix, else that of BRLITE_HUB, else Hugging Face.

    Raises `ModelError` for a text that is no name.
    """
    match = FULL_NAME.fullmatch(text)
    if match is None or len(text) > MAX_NAME:
        raise ModelError(f"{excerpt(text)} is not a model name such as organisation/model[:QUANT][@revision]")
    prefix = match["hub"]
    hub = HUB_PREFIXES[prefix.lower()] if prefix else default_hub()
    if hub == "modelscope" and "/" not in match["repository"]:
        raise ModelError(f"{excerpt(text)} is not a model name of ModelScope such as organisation/model")
    return ModelName(hub, match["repository"], match["quantization"], match["revision"])


def default_hub() -> HubName:
    """The hub of BRLITE_HUB. Raises `ModelError` for an unknown one."""
    name = os.environ.get(HUB_VARIABLE) or "huggingface"
    if name.lower() not in get_args(HubName):
        raise ModelError(f"{HUB_VARIABLE} is {excerpt(name)}; allowed are {' and '.join(get_args(HubName))}")
    return HUB_PREFIXES[name.lower()]


def may_be_a_name(path: str) -> bool:
    """Whether a text given as a path can also be a model's name on a hub."""
    return not path.startswith(PATH_STARTS) and "/" in path and FULL_NAME.fullmatch(path) is not None


def check_path(path: str) -> Path | None:
    """What exists at `path`, None if it may be a model's name. Raises `ModelError` if it is neither."""
    try:
        given = expand_home(path)
        if given.exists():
            return given
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise ModelError(f"model path {one_line(path)}: {reason(error)}") from None
    if not may_be_a_name(path):
        raise ModelError(f"model path {one_line(given.absolute())} does not exist")
    return None


def check_name(name: str) -> None:
    """Raise `ModelError` unless `name` has the form of a plain name: `model` or `organisation/model`."""
    if not PLAIN_NAME.fullmatch(name):
        raise ModelError(f"{excerpt(name)} is not a model name such as organisation/model")


def choose_files(names: Sequence[str], quantization: str | None = None) -> list[str]:
    """The files of a repository that make up the model.

    Config, tokenizer and safetensors; without safetensors, the `.bin` files; without either, or with a `quantization`,
    one GGUF file, or all parts of a split one in their order. Raises `ModelError` with the choices if several fit.
    """
    if quantization is None:
        for _, *weights in WEIGHT_FILES:
            if any(_matches(name, weights) for name in names):
                return [name for name in names if _matches(name, (*COMPANION_FILES, *weights))]
    files = gguf_models(names)
    if not files:
        looked_for = "" if quantization else "neither model.safetensors nor pytorch_model.bin, and "
        hint = f" for {quantization} to choose from" if quantization else ""
        raise ModelError(f"the repository holds {looked_for}no .gguf file{hint}")
    wanted = quantization or (DEFAULT_QUANTIZATION if len(files) > 1 else None)
    chosen = [name for name in files if wanted is None or _is_meant(name, wanted)]
    shown = dict.fromkeys(quantization_of(name) or PurePosixPath(name).name for name in files[: MAX_CHOICES * 2])
    choices = one_line(", ".join(shown))
    if not chosen:
        found = f"no .gguf file is {quantization}" if quantization else f"of {len(files)} .gguf files none is {wanted}"
        raise ModelError(f"{found}; name one as :QUANT: {choices}")
    if len(chosen) > 1:
        shown_files = one_line(", ".join(chosen[:MAX_CHOICES]), MAX_CHOICES * MAX_EXCERPT)
        raise ModelError(f"{len(chosen)} .gguf files are {wanted}; name one as :FILE: {shown_files}")
    if len(chosen[0]) > MAX_PATH:
        raise ModelError(f"{excerpt(chosen[0])} has {len(chosen[0])} characters; allowed are {MAX_PATH}")
    parts, present = part_names(chosen[0]), {*names}
    if missing := [name for name in parts if name not in present]:
        raise ModelError(f"the repository lacks {excerpt(missing[0])}, one of {len(parts)} parts")
    return parts


def quantization_of(file_name: str) -> str | None:
    """The quantization in a GGUF file's name, in capitals; None if it has none."""
    found = QUANTIZATION.findall(PurePosixPath(file_name).name.removesuffix(".gguf"))
    return str(found[-1]).upper() if found else None


def _is_meant(file_name: str, wanted: str) -> bool:
    """Whether a file has the name or the quantization `wanted`. Q4_K does not mean Q4_K_M."""
    base, wanted = PurePosixPath(file_name).name.lower(), wanted.lower()
    if wanted.endswith(".gguf"):
        return base == wanted
    quantization = quantization_of(file_name)
    if quantization is not None:
        return quantization.lower() == wanted
    return re.search(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9_])", base.removesuffix(".gguf")) is not None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

"""Finds a model folder's `config.json` and the files of its weights. Reads JSON, never a tensor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from brlite.checkpoint.model_file import check_model_file, exists, read_json_object
from brlite.errors import ModelError
from brlite.files.quoting import excerpt

WeightsKind = Literal["safetensors", "bin", "gguf"]

CONFIG_FILE = "config.json"

INDEX_FILE = "model.safetensors.index.json"
# In order of preference: the file that holds all weights, the index that names the shards, and what shards are called.
WEIGHT_FILES: tuple[tuple[WeightsKind, str, str, str], ...] = (
    ("safetensors", "model.safetensors", INDEX_FILE, "model-?????-of-?????.safetensors"),
    ("bin", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
)
WEIGHT_NAMES = tuple(name for _, single, index, _ in WEIGHT_FILES for name in (single, index))
TRACED_HINT = "; a traced .pt is named by model_file, beside the folder of its config, or converted with --from-pt"
SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


class Weights(NamedTuple):
    """The format of a model's weights, and their files. All of the files exist."""

    kind: WeightsKind
    files: tuple[Path, ...]


def find_weights(path: Path) -> Weights:
    """The weights at `path`, a model folder or a `.gguf` file. Raises `ModelError` if a file is missing."""
    if path.is_file():
        return Weights("gguf", (_whole_gguf(path),))
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder or file")
    for kind, single, index, _ in WEIGHT_FILES:
        files = (path / single,) if exists(path / single) else _shards(path / index) if exists(path / index) else ()
        if files:
            check_model_file(path / CONFIG_FILE)
            return Weights(kind, files)
    files = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf"))
    if len(files) > 1 and not SPLIT_GGUF.search(files[0].name):
        raise ModelError(f"{path}: holds {len(files)} .gguf files; give the path of one of them")
    if files:
        return Weights("gguf", (_whole_gguf(files[0]),))
    names = sorted(file.name for file in path.iterdir())
    found = ", ".join(map(excerpt, names[:6])) or "an empty folder"
    found += f" and {len(names) - 6} more" if len(names) > 6 else ""
    raise ModelError(f"{path}: no weights: looked for {', '.join(WEIGHT_NAMES)} or one .gguf file; found {found}")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights. Some of their files may be missing."""
    return any(file.name in WEIGHT_NAMES or file.suffix.lower() == ".gguf" for file in folder.iterdir())


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`."""
    return read_json_object(folder / CONFIG_FILE)


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map must map tensor names to file names, got {excerpt(weight_map)}")
    names = tuple(dict.fromkeys(map(str, weight_map.values())))
    for name in names:
        # A name with a folder in it could point anywhere on the machine.
        if Path(name).name != name or "\\" in name:
            raise ModelError(f"{index}: {excerpt(name)} must be the name of a file beside the index")
        if not exists(index.parent / name):
            raise ModelError(f"{index}: names the shard {excerpt(name)}, which is missing")
    return tuple(index.parent / name for name in names)


def _whole_gguf(file: Path) -> Path:
    if file.suffix.lower() != ".gguf":
        raise ModelError(
            f"{file}: a model must be a folder or a .gguf file{TRACED_HINT if file.suffix == '.pt' else ''}"
        )
    if SPLIT_GGUF.search(file.name):
        raise ModelError(f"{file}: one part of a split GGUF; merge the parts into one file first")
    return file

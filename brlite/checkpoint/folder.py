"""Finds a model folder's `config.json` and the files of its weights. Reads JSON, never a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from brlite.checkpoint.model_file import (
    FETCH_AGAIN,
    check_model_file,
    exists,
    first_part,
    gguf_files,
    is_gguf,
    part_names,
    read_json_object,
)
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
ADAPTER_FILE = "adapter_config.json"
TRACED_HINT = "; a traced .pt is named by model_file, beside the folder of its config, or converted with --from-pt"


class Weights(NamedTuple):
    """The format of a model's weights, and their files. All of the files exist."""

    kind: WeightsKind
    files: tuple[Path, ...]


def find_weights(path: Path) -> Weights:
    """The weights at `path`, a model folder or a `.gguf` file. Raises `ModelError` if a file is missing."""
    if path.is_file():
        return Weights("gguf", _gguf_parts(path))
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder or file")
    for kind, single, index, shard in WEIGHT_FILES:
        if files := (path / single,) if exists(path / single) else _shards(path, index, shard):
            check_model_file(path / CONFIG_FILE)
            return Weights(kind, files)
    ggufs = gguf_files(path)
    if len(ggufs) > 1:
        raise ModelError(f"{path}: holds {len(ggufs)} .gguf files; give the path of one of them")
    if ggufs:
        return Weights("gguf", _gguf_parts(ggufs[0]))
    if exists(path / ADAPTER_FILE):
        raise ModelError(f"{path}: is a LoRA adapter, not a model: merge it into its base model (merge_and_unload)")
    if (path / "snapshots").is_dir():
        raise ModelError(f"{path}: is a model's folder in a hub's cache; give its name, or a folder in its snapshots")
    names = sorted(file.name for file in path.iterdir())
    found = ", ".join(map(excerpt, names[:6])) or "an empty folder"
    found += f" and {len(names) - 6} more" if len(names) > 6 else ""
    raise ModelError(f"{path}: no weights: looked for {', '.join(WEIGHT_NAMES)} or one .gguf file; found {found}")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights. Some of their files may be missing."""
    patterns = [pattern for _, *patterns in WEIGHT_FILES for pattern in patterns]
    names = [file.name for file in folder.iterdir()]
    return bool(gguf_files(folder)) or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`."""
    return read_json_object(folder / CONFIG_FILE)


def _shards(folder: Path, index_name: str, shard_pattern: str) -> tuple[Path, ...]:
    """The files that the index names; without an index, all shards of which one is there. Empty if none is."""
    index = folder / index_name
    if exists(index):
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: weight_map must map tensor names to file names, got {excerpt(weight_map)}")
        names = list(dict.fromkeys(map(str, weight_map.values())))
        for name in names:
            # A name with a folder in it could point anywhere on the machine.
            if Path(name).name != name or "\\" in name:
                raise ModelError(f"{index}: {excerpt(name)} must be the name of a file beside the index")
    else:
        names = sorted(file.name for file in folder.glob(shard_pattern))
        names = part_names(names[0]) if names else []
    return _complete(folder, names)


def _complete(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    missing = [name for name in names if not exists(folder / name)]
    if missing:
        count = f"{len(missing)} of {len(names)} shards are missing"
        raise ModelError(f"{folder}: {count}, the first is {excerpt(missing[0])}: {FETCH_AGAIN}")
    return tuple(folder / name for name in names)


def _gguf_parts(file: Path) -> tuple[Path, ...]:
    """All parts of a split GGUF, of which `file` is the first; or the one file."""
    if not is_gguf(file):
        hint = TRACED_HINT if file.suffix == ".pt" else f"; give {file.parent}" if has_weights(file.parent) else ""
        raise ModelError(f"{file}: a model must be a folder or a .gguf file{hint}")
    if (first := first_part(file.name)) != file.name:
        raise ModelError(f"{file}: a later part of a split GGUF; give the first one, {first}")
    return _complete(file.parent, part_names(file.name))

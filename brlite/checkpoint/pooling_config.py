"""How a model's embeddings are made, by its files: sentence-transformers' beside the weights, or GGUF metadata.

`1_Pooling/config.json` names the pooling and `modules.json` what else is done; `config.json` says whether embeddings
may be cut (Matryoshka), in the words that vLLM reads. A bundle has no folders: there the first file has another name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from brlite.checkpoint.model_file import exists, read_json_object, read_model_text
from brlite.config.options import ModelSpec
from brlite.errors import ModelError
from brlite.files.quoting import excerpt

logger = logging.getLogger(__name__)

POOLING_FILE, BUNDLED_POOLING_FILE, MODULES_FILE = "1_Pooling/config.json", "pooling_config.json", "modules.json"
KNOWN_MODULES = (
    "Transformer",
    "Pooling",
    "Normalize",
)  # a vector of length 1 is what requests get unless they say else
SUPPORTED: dict[str, Literal["last", "mean"]] = {"lasttoken": "last", "mean": "mean"}
FLAG = "pooling_mode_"  # before 5.0: one flag a mode
FLAG_MODES = {"lasttoken": "lasttoken", "mean_tokens": "mean"}
GGUF_MODES = {1: "mean", 3: "lasttoken"}


def settle_pooling(path: Path, config: Mapping[str, Any], spec: ModelSpec) -> ModelSpec:
    """The spec with what it leaves to the model's files. An unsupported kind turns embeddings off, which the log says.

    Raises `ModelError` for a file that cannot be read.
    """
    pooling, sizes = spec.pooling, spec.matryoshka_dimensions
    if pooling == "auto":
        mode = _read_mode(path, config)
        pooling = SUPPORTED.get(mode, "none")
        if mode not in SUPPORTED:
            reason = "its files ask for %s; set pooling to have last or mean"
            logger.warning("model %s: embeddings are refused: " + reason, spec.name, mode)
    return msgspec.structs.replace(spec, pooling=pooling, matryoshka_dimensions=sizes or _read_sizes(config))


def _read_mode(path: Path, config: Mapping[str, Any]) -> str:
    """The mode in sentence-transformers' word, or what else stands in the way, in words. "lasttoken" is the default."""
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        return "attention in both directions"
    if "pooling_type" in config:  # of a GGUF file
        return GGUF_MODES.get(config["pooling_type"], f"pooling type {excerpt(config['pooling_type'])}")
    if not path.is_dir():
        return "lasttoken"
    if exists(path / MODULES_FILE):
        try:
            found = msgspec.json.decode(read_model_text(path / MODULES_FILE), type=list[dict[str, Any]])
        except msgspec.MsgspecError as error:
            raise ModelError(f"{path / MODULES_FILE}: must hold a JSON list of objects: {error}") from None
        modules = [str(module.get("type", "")).rpartition(".")[2] for module in found]
        other = next((module for module in modules if module not in KNOWN_MODULES), None)
        if other is not None:
            return f"a {excerpt(other)} module"
    for name in (POOLING_FILE, BUNDLED_POOLING_FILE):
        if exists(path / name):
            return _mode_of(read_json_object(path / name))
    return "lasttoken"


def _mode_of(pooling: Mapping[str, Any]) -> str:
    if isinstance(pooling.get("pooling_mode"), str):
        return str(pooling["pooling_mode"])
    chosen = [name.removeprefix(FLAG) for name, is_set in pooling.items() if name.startswith(FLAG) and is_set is True]
    modes = [FLAG_MODES.get(name, name) for name in chosen]
    return modes[0] if len(modes) == 1 else f"{' and '.join(modes) or 'no'} pooling"


def _read_sizes(config: Mapping[str, Any]) -> tuple[int, ...]:
    sizes = config.get("matryoshka_dimensions")
    if isinstance(sizes, list) and sizes and all(type(size) is int and size > 0 for size in sizes):
        return tuple(sorted(sizes))
    return (0,) if config.get("is_matryoshka") is True else ()

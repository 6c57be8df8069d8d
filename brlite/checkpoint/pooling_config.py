"""Reads from a model's files how its embeddings are made: from sentence-transformers' files, or from GGUF metadata.

`1_Pooling/config.json` names the pooling, `modules.json` the other steps. `config.json` says whether embeddings may be
shortened (Matryoshka), with the keys that vLLM reads. A bundle has no folders: its first file has another name.
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
from brlite.files.quoting import MAX_EXCERPT, excerpt, one_line, reason

logger = logging.getLogger(__name__)

POOLING_FILE, BUNDLED_POOLING_FILE, MODULES_FILE = "1_Pooling/config.json", "pooling_config.json", "modules.json"
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")  # brlite normalizes by default
SUPPORTED: dict[str, Literal["last", "mean"]] = {"lasttoken": "last", "mean": "mean"}
FLAG = "pooling_mode_"  # in versions before 5.0: a flag for each mode
GGUF_MODES = {1: "mean", 2: "CLS pooling", 3: "lasttoken", 4: "scores (rank pooling)"}


def settle_pooling(path: Path, config: Mapping[str, Any], spec: ModelSpec) -> ModelSpec:
    """The spec, with pooling and dimensions from the model's files where it has none. An unsupported kind of pooling
    turns embeddings off, with a warning in the log.

    Raises `ModelError` for a file that cannot be read.
    """
    pooling, sizes = spec.pooling, spec.matryoshka_dimensions
    if pooling == "auto":
        mode = _read_mode(path, config)
        pooling = SUPPORTED.get(mode, "none")
        if mode not in SUPPORTED:
            logger.warning(
                "model %s: embeddings are refused: its files ask for %s, not for the last token or the mean; to have "
                "them set pooling to last or mean",
                spec.name,
                one_line(mode, MAX_EXCERPT),
            )
    if not sizes:
        sizes = _read_sizes(config, spec.name)
    return msgspec.structs.replace(spec, pooling=pooling, matryoshka_dimensions=sizes)


def _read_sizes(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The lengths that embeddings may be cut to; (0,): any. A value of the wrong type counts as none."""
    warning = "model %s: %s in its config.json must be %s, not %s: it is ignored"
    is_any, sizes = config.get("is_matryoshka"), config.get("matryoshka_dimensions")
    if not isinstance(is_any, bool | None):
        logger.warning(warning, name, "is_matryoshka", "true or false", excerpt(is_any))
    if isinstance(sizes, list | None) and all(type(size) is int and size > 0 for size in sizes or ()):
        return tuple(sorted(sizes or ())) or ((0,) if is_any is True else ())
    logger.warning(warning, name, "matryoshka_dimensions", "a list of whole numbers above 0", excerpt(sizes))
    return (0,) if is_any is True else ()


def attends_both_ways(config: Mapping[str, Any]) -> bool:
    """Whether a token sees those behind it, which no backend computes."""
    return config.get("is_causal") is False or bool(config.get("use_bidirectional_attention"))


def _read_mode(path: Path, config: Mapping[str, Any]) -> str:
    """The mode as sentence-transformers names it, by default "lasttoken"; or, in words, what is not supported."""
    if attends_both_ways(config):
        return "attention in both directions"
    if "pooling_type" in config:  # of a GGUF file
        kind = config["pooling_type"]
        return GGUF_MODES.get(kind if type(kind) is int else 0, f"pooling type {excerpt(kind)}")
    if not path.is_dir():
        return "lasttoken"
    if exists(path / MODULES_FILE):
        try:
            found = msgspec.json.decode(read_model_text(path / MODULES_FILE), type=list[dict[str, Any]])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ModelError(f"{path / MODULES_FILE}: must hold a JSON list of objects: {reason(error)}") from None
        modules = [str(module.get("type", "")).rpartition(".")[2] for module in found]
        other = next((module for module in modules if module not in KNOWN_MODULES), None)
        if other is not None:
            return f"a {excerpt(other)} module"
    for name in (POOLING_FILE, BUNDLED_POOLING_FILE):
        if exists(path / name):
            stated = read_json_object(path / name)
            if isinstance(stated.get("pooling_mode"), str):
                return str(stated["pooling_mode"])
            flags = [flag.removeprefix(FLAG) for flag in stated if flag.startswith(FLAG) and stated[flag] is True]
            modes = ["mean" if flag == "mean_tokens" else flag for flag in flags]
            return modes[0] if len(modes) == 1 else f"{' and '.join(modes) or 'no'} pooling"
    return "lasttoken"

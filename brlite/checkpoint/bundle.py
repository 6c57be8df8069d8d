"""Reads bundles: folders that `brlite convert` writes. A bundle is a checkpoint with a packed file beside its weights.

    brlite-manifest.json        written last: model, precision, names, the size and sha256 of every file
    config.json …               the model's config, generation config, tokenizer and chat template, copied
    model-….safetensors         the weights in Hugging Face's names: matrices in bfloat16, vectors in float32
    packed.PRECISION.brlite     the same weights as the native kernels read them, mapped at the start

torch, other precisions, ranks and other programs read the safetensors. The packed file holds the same weights for
native kernels in one precision. If it is missing or damaged, the safetensors are packed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from brlite.checkpoint.checkpoint import Checkpoint
from brlite.checkpoint.model_file import MAX_JSON_BYTES, exists, read_model_text
from brlite.checkpoint.safetensors import SafetensorsCheckpoint
from brlite.errors import ModelError
from brlite.files.new_file import FileRecord
from brlite.files.quoting import excerpt, reason
from brlite.models.precision import WEIGHTS_NAMES, Precision, PrecisionName

MANIFEST_FILE = "brlite-manifest.json"
PROGRESS_FILE = "brlite-progress.json"  # the manifest of a bundle that is not finished
PACKED_SUFFIX = ".brlite"
FORMAT = "brlite bundle"
FORMAT_VERSION = 1
IDENTITY_CHARACTERS = 32
MAX_FILE_NAME = 255


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `brlite-manifest.json`. `source` is the identity of the checkpoint that the bundle was made from.

    `input_name` and `output_name` are for the manual's configs: the names of the traced file, or the defaults.
    """

    format: str
    format_version: int
    brlite: str
    model: str
    architecture: str
    precision: PrecisionName
    num_parameters: int
    vocab_size: int
    input_name: str
    output_name: str
    source: str
    files: dict[str, FileRecord]


class BundleCheckpoint(SafetensorsCheckpoint):
    """Implements `Checkpoint`. Its identity depends on content alone: a copied or moved bundle keeps it."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        weights = {name: record for name, record in self.manifest.files.items() if name.endswith(".safetensors")}
        for name, record in weights.items():
            try:
                num_bytes = (folder / name).stat().st_size
            except OSError as error:
                raise ModelError(f"{folder / name}: the bundle's manifest names it, but: {error.strerror}") from error
            if num_bytes != record.num_bytes:
                found = f"{num_bytes} bytes; the bundle's manifest says {record.num_bytes}"
                raise ModelError(f"{folder / name}: has {found}")
        super().__init__(folder, tuple(folder / name for name in weights))
        self.identity = bundle_identity(self.config, weights)


def is_bundle(path: Path) -> bool:
    """Whether `path` is a bundle, finished or not."""
    return exists(path / MANIFEST_FILE) or exists(path / PROGRESS_FILE)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished bundle. Raises `ModelError`."""
    if not exists(folder / MANIFEST_FILE):
        raise ModelError(f"{folder}: a bundle that is not finished; run the same `brlite convert` again")
    return _read(folder / MANIFEST_FILE)


def read_progress(folder: Path) -> Manifest | None:
    """The manifest with the files that are finished so far, of a finished bundle too; None without one."""
    for name in (PROGRESS_FILE, MANIFEST_FILE):
        if exists(folder / name):
            return _read(folder / name)
    return None


def bundle_identity(config: Mapping[str, Any], weights: Mapping[str, FileRecord]) -> str:
    """A digest that changes with the config and with any byte of the weights, and with nothing else."""
    content = [config, sorted((name, record.sha256) for name, record in weights.items())]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:IDENTITY_CHARACTERS]


def precision_made_for(checkpoint: Checkpoint) -> PrecisionName | None:
    """What precision `auto` means for a bundle: that of its last conversion. None for other checkpoints."""
    return checkpoint.manifest.precision if isinstance(checkpoint, BundleCheckpoint) else None


def packed_name(precision: Precision) -> str:
    """The name of a bundle's file of packed weights. All precisions with int8 weights share one."""
    return f"packed.{WEIGHTS_NAMES[precision.weights]}{PACKED_SUFFIX}"


def _read(file: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode(read_model_text(file, MAX_JSON_BYTES), type=Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ModelError(f"{file}: not the manifest of a bundle: {reason(error)}") from error
    if (manifest.format, manifest.format_version) != (FORMAT, FORMAT_VERSION):
        found = f"{excerpt(manifest.format)} version {manifest.format_version}"
        raise ModelError(f"{file}: is {found}; this brlite reads {FORMAT!r} version {FORMAT_VERSION}")
    for name in manifest.files:
        is_plain = Path(name).name == name and "\\" not in name and name not in ("", ".", "..")
        if not is_plain or not name.isprintable() or len(name) > MAX_FILE_NAME:
            raise ModelError(f"{file}: {excerpt(name)} must be the name of a file beside it")
    return manifest
